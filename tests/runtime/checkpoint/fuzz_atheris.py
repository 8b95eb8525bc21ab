"""One parser under atheris, in a process of its own; started by fuzz.py.

fuzz_atheris.py PARSER [FLAGS OF LIBFUZZER] [DIRECTORY OF INPUTS]
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
with atheris.instrument_imports(include=["goku_runtime.checkpoint"]):
    from parsers import PARSERS


def main(name: str, *flags: str) -> None:
    """Ends the process: 0 when the time is over, something else when an input is wrong."""
    parser = PARSERS[name]

    def once(data: bytes) -> None:
        parser.check(data)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """Half of the time as JSON: random bytes seldom are any."""
        random = Random(seed)
        if random.randrange(2):
            changed = parser.mutated(data, random)
            if len(changed) <= most:
                return changed
        return bytes(atheris.Mutate(data, most))

    atheris.Setup([sys.argv[0], *flags], once, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
