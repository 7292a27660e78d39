"""torchrun that dies with the worker that started it: `python -m workers.agent TORCHRUN ARGUMENTS`.

A plain torchrun outlives its parent, and its ranks outlive a torchrun that is killed: they have
sessions of their own. Here the kernel kills torchrun when its parent dies, and each rank when
torchrun does (workers.process): after a worker's death nothing is left on a card.
"""

import signal
import sys

from workers.mortal import die_with_parent


def main() -> int:
    """Run torchrun.

    Returns:
        The exit code of the rank that failed first, 128 + its signal where one has killed it;
        torchrun itself says 1 of whatever happens.
    """
    die_with_parent()
    # The signal asks ranks where they stand; by default it would end this process, and them with it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # A second, in which it is mortal already.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        code: int = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main())
