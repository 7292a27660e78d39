"""The two sides of benchmarks/training.py, each in a process of its own that takes steps when told.

A side reads one JSON object a line from standard input and answers with one: `gate` computes loss
and gradients of given examples with a given adapter, `step` takes optimizer steps and says how long
they took, an empty line ends. Ours is the engine itself: `build` and `step`, as a run calls them.
The other is TRL's SFTTrainer, whose own loop runs and waits for the next command at the end of
each step, so that loading data, logging and the optimizer are in its time as they are in ours.
Nothing of the engine is imported there.
"""

import argparse
import ctypes
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Act = Callable[[Mapping[str, Any]], Any]
# As large as the entries of B are in a trained adapter; zero would hide the gradient of A.
SPREAD_B = 0.02


class Clock:
    """Seconds of this process since it was started, by the wall and on the processor."""

    def start(self) -> None:
        """Begin to count."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return the seconds since `start`."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall": wall, "cpu": cpu}


class Slots:
    """Counts the positions that a model computes, padding and all."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.get_input_embeddings().register_forward_pre_hook(self._add)

    def _add(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self.count += inputs[0].numel()


# ---- what both sides do alike -----------------------------------------------------------------


def trained(model: Any) -> dict[str, Any]:
    """Return what trains, by the names of PEFT's file."""
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def set_adapter(model: Any, path: Path) -> None:
    """Overwrite an adapter; the first side that comes here makes the one for all."""
    torch = importlib.import_module("torch")
    files = importlib.import_module("safetensors.torch")
    parameters = trained(model)
    if not path.exists():
        generator = torch.Generator().manual_seed(7)
        for name, parameter in parameters.items():
            if ".lora_B" in name:
                parameter.data.normal_(std=SPREAD_B, generator=generator)
        files.save_file({k: p.detach().contiguous() for k, p in parameters.items()}, path)
        return
    tensors = files.load_file(path)
    if tensors.keys() != parameters.keys():
        differing = sorted(tensors.keys() ^ parameters.keys())
        raise SystemExit(f"The sides train other layers: {len(differing)} as {differing[0]}.")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def gradients(model: Any, path: Path) -> None:
    """Write the gradients of an adapter and forget them."""
    files = importlib.import_module("safetensors.torch")
    files.save_file({k: p.grad.contiguous() for k, p in trained(model).items()}, path)
    model.zero_grad(set_to_none=True)


def rest(command: Mapping[str, Any]) -> dict[str, float]:
    """Return the most memory that this process ever had; give back what it does not use.

    That is done behind the last step before the others take theirs.
    """
    if command["rests"]:
        ctypes.CDLL(None).malloc_trim(0)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


# ---- ours -------------------------------------------------------------------------------------


def ours(given: Mapping[str, Any], answer: Callable[[Any], Mapping[str, Any] | None]) -> None:
    """Build a run, write down what the other side needs, and take its steps."""
    from studio.disk import RunFolder
    from workers.engine.batches import collate
    from workers.engine.build import build
    from workers.engine.lora import adapter_config, base_of
    from workers.engine.loss import batch_loss
    from workers.engine.train import step

    folder = Path(given["folder"])
    training = build(RunFolder(path=Path(given["run"])))
    examples, model = training.examples, training.model
    config: Any = adapter_config(base_of(model), training.spec.lora)  # type: ignore[arg-type]
    lora = {key: config.to_dict()[key] for key in ("r", "lora_alpha", "target_parameters")}
    lora["target_modules"] = sorted(config.target_modules)
    (folder / "lora.json").write_text(json.dumps(lora), encoding="utf-8")
    everything = list(examples)
    np.savez(
        folder / "examples.npz",
        tokens=np.concatenate([each.tokens for each in everything]),
        mask=np.concatenate([each.mask for each in everything]),
        lengths=examples.lengths,
    )
    set_adapter(model, folder / "adapter.safetensors")
    slots, clock = Slots(model), Clock()
    steps = training.order.steps()
    packed = training.batch.packing
    command = answer({"note": f"packing {'on' if packed else 'off'}"})
    while command:
        if command["act"] == "gate":
            chosen = [examples[index] for index in command["examples"]]
            supervised = int(examples.supervised[command["examples"]].sum())
            batch = collate(chosen, training.pad_token_id, packed=packed)
            loss = training.root(batch_loss, batch, supervised)
            loss.backward()
            gradients(model, Path(command["path"]))
            command = answer({"loss": float(loss.detach())})
            continue
        slots.count, before = 0, len(training.tokens)
        clock.start()
        for _ in range(command["steps"]):
            step(training, next(steps))
        times = clock.read()
        tokens = sum(training.tokens[before:])
        command = answer({**times, "tokens": tokens, "slots": slots.count, **rest(command)})


# ---- TRL --------------------------------------------------------------------------------------


def trl(given: Mapping[str, Any], answer: Callable[[Any], Mapping[str, Any] | None]) -> None:
    """Build an SFTTrainer with the same settings and let it train."""
    trainer = sft_trainer(given)
    torch = importlib.import_module("torch")
    base = trainer.model.get_base_model()
    experts = getattr(base.config, "_experts_implementation", None)
    set_adapter(trainer.model, Path(given["folder"]) / "adapter.safetensors")
    command = answer({"note": f"experts: {experts}"})
    columns = trainer.train_dataset if not given["trl"].get("packing") else dataset(given)
    while command and command["act"] == "gate":
        trainer.model.train()
        inputs = trainer.data_collator([columns[index] for index in command["examples"]])
        number = (inputs["labels"][:, 1:] != -100).sum()
        try:
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=number)
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            command = answer({"refused": f"{type(error).__name__}: {error}"})
            continue
        loss.backward()
        gradients(trainer.model, Path(command["path"]))
        command = answer({"loss": float(loss.detach())})
    if not command:
        return
    torch.manual_seed(0)
    trainer.add_callback(_waiting(trainer, answer, command))
    trainer.train()


def _waiting(trainer: Any, answer: Callable[[Any], Any], first: Mapping[str, Any]) -> Any:
    from transformers import TrainerCallback  # this side alone pays for it

    slots, clock = Slots(trainer.model.get_base_model()), Clock()

    class Waiting(TrainerCallback):
        """Answers and waits after so many steps."""

        command, left = first, first["steps"]
        tokens = trainer._total_train_tokens  # noqa: SLF001  # its own count of real tokens

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Start the clock: the first command is here already."""
            clock.start()

        def on_step_end(self, *called: Any, **_: Any) -> None:
            """Count down; at zero report, wait, and go on or stop."""
            _args, _state, control = called
            self.left -= 1
            if self.left:
                return
            times, now = clock.read(), trainer._total_train_tokens  # noqa: SLF001
            found = {"tokens": now - self.tokens, "slots": slots.count, **rest(self.command)}
            command = answer({**times, **found})
            slots.count, self.tokens = 0, now
            if not command:
                control.should_training_stop = True
                return
            self.command, self.left = command, command["steps"]
            clock.start()

    return Waiting()


def dataset(given: Mapping[str, Any]) -> Any:
    """Return the same tokens and labels as ours, as TRL takes them when they are made already."""
    kept = np.load(Path(given["folder"]) / "examples.npz")
    ends = np.cumsum(kept["lengths"].astype(np.int64))[:-1]
    labels = np.where(kept["mask"], kept["tokens"].astype(np.int64), -100)
    # Our batches do not count the first token of an example: nothing predicts it.
    labels[np.concatenate([[0], ends])] = -100
    return importlib.import_module("datasets").Dataset.from_dict(
        {
            "input_ids": [each.tolist() for each in np.split(kept["tokens"], ends)],
            "labels": [each.tolist() for each in np.split(labels, ends)],
        }
    )


def sft_trainer(given: Mapping[str, Any]) -> Any:
    """Return a stock trainer; what is not named here is as TRL has it."""
    library, peft = importlib.import_module("trl"), importlib.import_module("peft")
    transformers = importlib.import_module("transformers")
    folder, spec = Path(given["folder"]), given["spec"]
    lora = json.loads((folder / "lora.json").read_text(encoding="utf-8"))
    optim, train = spec["optim"], spec["train"]
    return library.SFTTrainer(
        model=given["model"],
        processing_class=transformers.AutoTokenizer.from_pretrained(given["model"]),
        train_dataset=dataset(given),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **lora),
        args=library.SFTConfig(
            **{
                "output_dir": str(folder / "trl"),
                "model_init_kwargs": {"dtype": "float32"},
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "max_length": spec["data"]["max_length_tokens"],
                "per_device_train_batch_size": spec["batch"]["micro_batch_size"],
                "learning_rate": optim["learning_rate"],
                "lr_scheduler_type": optim["schedule"],
                "warmup_steps": int(optim["warmup_ratio"] * train["max_steps"]),
                "weight_decay": optim["weight_decay"],
                "max_grad_norm": optim["max_grad_norm"],
                "max_steps": train["max_steps"],
                # Of 42 to 53 the one whose first 16 steps, for tiny/qwen3.5, hold as much padding as
                # a whole epoch (58 %); with the default, 42, they hold more, which flatters us.
                "data_seed": 45,
                # A second term of the loss, which ours has not; without it TRL is faster.
                **({"router_aux_loss_coef": 0.0} if given["is_moe"] else {}),
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "log_level": "error",
                **given["trl"],
            }
        ),
    )


def main() -> None:
    """Be one side until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("given", help="a JSON object")
    given = json.loads(parser.parse_args().given)
    # Libraries print: what is answered goes another way than that.
    out: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(said: Any) -> Mapping[str, Any] | None:
        print(json.dumps(said), file=out, flush=True)
        line = sys.stdin.readline().strip()
        command: Mapping[str, Any] | None = json.loads(line) if line else None
        return command

    (trl if "trl" in given else ours)(given, answer)


if __name__ == "__main__":
    main()
