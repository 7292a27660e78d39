"""Names of all folders and files under the home folder: the contract between studio and workers.

A folder explains itself: what a name means stands here and nowhere else.
Files that another process reads appear whole: they are written beside their name and renamed.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from studio.errors import disk_errors

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Everything that one Run writes: the contract between launcher, engine and page."""

    path: Path

    @property
    def home(self) -> "Home":
        """The home folder that the run lies in."""
        return Home(path=self.path.parent.parent)

    @property
    def spec(self) -> Path:
        """JobSpec as JSON."""
        return self.path / "spec.json"

    @property
    def dataset(self) -> Path:
        """Symbolic link to the canonical JSONL of the Dataset."""
        return self.path / "dataset.jsonl"

    @property
    def datasets(self) -> Path:
        """Folder of symbolic links to every Dataset that the run reads, by content hash."""
        return self.path / "datasets"

    def dataset_of(self, sha256: str) -> Path:
        """Return the canonical JSONL of one of the run's Datasets.

        Without a content hash, or where only `dataset` was prepared, it is that one.
        """
        linked = self.datasets / f"{sha256}.jsonl"
        return linked if sha256 and linked.exists() else self.dataset

    @property
    def metrics(self) -> Path:
        """One JSON object a line: {"step", "total_steps", "values": {name: value}}."""
        return self.path / "metrics.jsonl"

    @property
    def stage(self) -> Path:
        """What the engine does now, one JSON object: {"stage", "detail"}."""
        return self.path / "stage.json"

    @property
    def log(self) -> Path:
        """Standard output and error of the engine."""
        return self.path / "log.txt"

    @property
    def result(self) -> Path:
        """How the run ended: {"state": "FINISHED" | "STOPPED", "step", "total_steps", ...}."""
        return self.path / "result.json"

    @property
    def error(self) -> Path:
        """Why the run failed: {"type", "message", "hint", "field", "code"}."""
        return self.path / "error.json"

    @property
    def wishes(self) -> Path:
        """How often a save and an evaluation were asked for: {"saves", "evaluations"}."""
        return self.path / "wishes.json"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line: {"at", "epoch", "kind", "step", "text"}."""
        return self.path / "events.jsonl"

    @property
    def owner(self) -> Path:
        """Mark of the Lease that may write here; a trainer of another one ends by itself."""
        return self.path / "owner.txt"

    @property
    def origin(self) -> Path:
        """Of a fork: the Checkpoint that it begins from, and origin.json that says how."""
        return self.path / "origin"

    @property
    def proofs(self) -> Path:
        """Proofs measured on the run: see studio.domain.proof."""
        return self.path / "proofs.json"

    @property
    def samples(self) -> Path:
        """Sample replies, one JSON object a line: see studio.domain.sample."""
        return self.path / "samples.jsonl"

    @property
    def recall(self) -> Path:
        """Answers of base and tuned model to the questions of the example Dataset."""
        return self.path / "recall.json"

    @property
    def adapter(self) -> Path:
        """The trained Adapter in PEFT's own layout."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model of a full fine-tuning, a whole Hugging Face folder."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Folder of Checkpoints, step-000100 and so on."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the Checkpoint at `step`."""
        return self.checkpoints / f"step-{step:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderFolder:
    """What a merge or a chat process reads and writes beside its result."""

    path: Path

    @property
    def home(self) -> "Home":
        """The home folder that it lies in."""
        return Home(path=self.path.parent.parent)

    @property
    def order(self) -> Path:
        """What is asked for, as JSON."""
        return self.path / "order.json"

    @property
    def log(self) -> Path:
        """Standard output and error of the process."""
        return self.path / "log.txt"

    @property
    def stage(self) -> Path:
        """What the process does now, one JSON object: {"stage", "detail", "fraction"}."""
        return self.path / "stage.json"

    @property
    def error(self) -> Path:
        """Why it failed: {"type", "message", "hint", "field", "code"}."""
        return self.path / "error.json"

    @property
    def ready(self) -> Path:
        """A chat process says here where it listens: {"port", "pid", "models"}."""
        return self.path / "ready.json"

    @property
    def certificate(self) -> Path:
        """Certificate of a merge; also copied beside the weights."""
        return self.path / "certificate.json"

    @property
    def weights(self) -> Path:
        """The merged model: an ordinary Hugging Face folder."""
        return self.path / "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """The home folder of one installation."""

    path: Path

    def create(self) -> None:
        """Create the folders, readable by their owner only.

        Raises:
            MachineError: The disk is full or read-only.
        """
        with disk_errors("creating the home folder"):
            for folder in (
                self.path,
                self.datasets,
                self.incoming,
                self.runs,
                self.merges,
                self.chats,
                self.models,
                self.tokens,
                self.verdicts,
                self.backups,
                self.workers,
                self.broker,
                self.broker / "queue",
            ):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.path / "studio.db"

    @property
    def broker(self) -> Path:
        """Folder of the embedded message broker."""
        return self.path / "broker"

    @property
    def datasets(self) -> Path:
        """Folder of canonical datasets, named by content hash."""
        return self.path / "datasets"

    @property
    def incoming(self) -> Path:
        """Folder of uploads that are not accepted yet."""
        return self.path / "incoming"

    @property
    def runs(self) -> Path:
        """Folder of run folders."""
        return self.path / "runs"

    @property
    def merges(self) -> Path:
        """Folder of merge folders."""
        return self.path / "merges"

    @property
    def chats(self) -> Path:
        """Folder of chat folders."""
        return self.path / "chats"

    @property
    def models(self) -> Path:
        """Folder of base models that the studio builds itself (the tiny ones)."""
        return self.path / "models"

    @property
    def tokens(self) -> Path:
        """Folder of tokenised Datasets: see studio.tokens.cache."""
        return self.path / "tokens"

    @property
    def quantized(self) -> Path:
        """Folder of base weights in 4 bits, kept for the next start."""
        return self.path / "quantized"

    @property
    def verdicts(self) -> Path:
        """Folder that keeps which tokenizers have a fast path: see studio.tokens.bpe."""
        return self.tokens / "verdicts"

    def tiny_tokenizer(self, model_id: str) -> Path:
        """Return the folder of a tiny model's tokenizer, which the page needs before the model."""
        return self.models / f"{model_id.removeprefix('tiny/')}-tokenizer"

    @property
    def worker_lock(self) -> Path:
        """Locked by the embedded worker as long as it lives; see `studio.locks.worker_note`."""
        return self.path / "worker.lock"

    @property
    def workers(self) -> Path:
        """Folder of one lock file per worker, which it holds as long as it lives."""
        return self.path / "workers"

    def worker(self, name: str) -> Path:
        """Return the lock file of a worker."""
        return self.workers / f"{name}.lock"

    def slots(self, boot_id: str) -> Path:
        """Return the folder of a machine's lock files: who works on which card."""
        return self.path / "slots" / boot_id

    @property
    def backups(self) -> Path:
        """Folder of copies of the database."""
        return self.path / "backups"

    @property
    def client_lock(self) -> Path:
        """Locked in common by every page and command that needs a worker.

        An embedded worker that has nothing to do ends when nobody holds it.
        """
        return self.path / "clients.lock"

    @property
    def worker_log(self) -> Path:
        """Log of the embedded worker."""
        return self.path / "worker.log"

    def dataset(self, sha256: str) -> Path:
        """Return the canonical JSONL of the Dataset with that content hash."""
        return self.datasets / f"{sha256}.jsonl"

    def dataset_index(self, sha256: str) -> Path:
        """Return the index of the Dataset's records: see studio.intake.canonical."""
        return self.datasets / f"{sha256}.index.npy"

    def dataset_rejects(self, sha256: str) -> Path:
        """Return the records that were dropped when the Dataset was stored, as JSON lines."""
        return self.datasets / f"{sha256}.rejects.jsonl"

    def rejects(self, source_sha256: str) -> Path:
        """Return the bad records of a file that was read and not stored, as JSON lines."""
        return self.incoming / f"rejects-{source_sha256}.jsonl"

    def run(self, run_id: int) -> RunFolder:
        """Return the folder of a Run."""
        return RunFolder(path=self.runs / f"{run_id:06d}")

    def merge(self, artifact_id: int) -> OrderFolder:
        """Return the folder of a Merge."""
        return OrderFolder(path=self.merges / f"{artifact_id:06d}")

    def chat(self, chat_id: int) -> OrderFolder:
        """Return the folder of a Chat process."""
        return OrderFolder(path=self.chats / f"{chat_id:06d}")


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text so that no reader ever sees half of it; the folder must exist.

    Raises:
        MachineError: The disk is full or read-only; the old file, if any, is untouched.
    """
    with disk_errors(f"writing {path.name}"):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
