"""The process whose writes test_session_power.py records: checkpoints of a growing, changing, forgotten, grown-again session.

After each checkpoint it writes the tokens that are promised now to ``promise.json`` lines in the same log (a write to a file
named ``promised``, beside the session).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.runtime.sessions.toy import Chat, open_session, some_tokens


def main(folder: Path) -> None:
    promised = os.open(folder / "promised", os.O_WRONLY | os.O_CREAT, 0o600)
    path = folder / "chat.kv"

    def promise(tokens: list[int]) -> None:
        os.pwrite(promised, json.dumps(tokens).encode(), 0)

    history = some_tokens(30)
    for round_ in range(4):
        session = open_session(path)
        chat = Chat(session, frames=4 if round_ % 2 else 64)
        chat.start(history)
        chat.save(whole=False)
        promise(chat.tokens)
        for step in range(3):
            chat.extend(some_tokens(11, seed=10 * round_ + step))
            chat.save(whole=step == 2)
            promise(chat.tokens)
        chat.cut(20 + 7 * round_)
        chat.extend(some_tokens(17, seed=100 + round_))
        chat.save()
        promise(chat.tokens)
        history = list(chat.tokens)
        session.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
