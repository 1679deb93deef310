"""Which sequences are kept, as a tree of pages: sequences that begin alike share the pages of what they have in common.

A page is known by the tokens up to its end and by the steps in which they were computed, since its bits depend on both. Two kinds
of places are gone on from:

- A prompt that begins like another goes on where a fresh run of it would begin a step, too: behind a multiple of
  the prefill chunk. So its answer is that of a fresh run, to the bit.
- A prompt that begins with all of an earlier prompt and its answer (the next turn of a conversation) goes on behind them, as
  a session does.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..sessions.steps import Steps


@dataclass(eq=False)
class Node:
    """A sealed page of all layers, behind the page of its parent; a root, the beginning of an owner's sequences, is none.

    Attributes:
        number: in the index. cuts: see :meth:`Steps.cuts`. records: by layer. used: when, by the tree's count.
        held: by how many sequences that are in RAM. gone: not in the tree any more.
    """

    number: int
    parent: Node | None
    tokens: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    records: tuple[int, ...] = ()
    used: int = 0
    held: int = 0
    gone: bool = False
    children: dict[tuple[int, ...], list[Node]] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)


@dataclass(eq=False)
class Turn:
    """Where an answer ended: tokens behind the pages up to ``node``, of which those of the open page have keys and values.

    Attributes:
        n_kv: tokens of the whole sequence with keys and values. cuts: of the open page's tokens.
        records: of the open page, [keys, values] by layer; none where it was not written.
        gone: not in the tree any more.
    """

    number: int
    node: Node
    tokens: tuple[int, ...]
    n_kv: int
    cuts: tuple[int, ...]
    records: tuple[int, ...] = ()
    used: int = 0
    gone: bool = False


@dataclass(frozen=True)
class Found:
    """What a prompt can go on from: ``count`` tokens, whose pages are those of ``path``; behind a ``turn``, or not."""

    count: int
    path: tuple[Node, ...] = ()
    turn: Turn | None = None


class Tree:
    """The pages that are kept.

    Args:
        chunk: at whose multiples a prompt is cut into steps.
        exact: go on only from where a fresh run begins a step.

    Attributes:
        size: how many pages and turns there are.
    """

    def __init__(self, page_size: int, chunk: int, *, exact: bool) -> None:
        self._size = page_size
        self._chunk = chunk
        self._exact = exact
        self._roots: dict[bytes, Node] = {}
        self._clock = 0
        self.size = 0

    def root(self, owner: bytes) -> Node:
        """Return where the sequences of an owner begin."""
        return self._roots.setdefault(owner, Node(0, None))

    def find(self, owner: bytes, prompt: Sequence[int]) -> Found:
        """Return from where most of a prompt is kept; at least its last token is not, but behind a turn that is all of it."""
        size, tokens = self._size, tuple(prompt)
        best: tuple[int, Node | None, Turn | None] = (0, None, None)
        pending = [(self.root(owner), 0, True)]
        while pending:
            node, done, fresh = pending.pop()
            if fresh and best[0] < done < len(tokens) and done % self._chunk == 0:
                best = (done, node, None)
            for turn in () if self._exact else node.turns:
                if turn.n_kv > best[0] and tokens[done : done + len(turn.tokens)] == turn.tokens:
                    best = (turn.n_kv, node, turn)
            for child in node.children.get(tokens[done : done + size], ()):
                pending.append((child, done + size, fresh and child.cuts == self.fresh_cuts(done)))
        count, last, turn_found = best
        path: list[Node] = []
        while last is not None and last.parent is not None:
            path.append(last)
            last = last.parent
        return Found(count, tuple(reversed(path)), turn_found)

    def fresh_cuts(self, start: int) -> tuple[int, ...]:
        """Return the cuts of the page at ``start`` in a run that reads it as a part of a prompt, in whole steps."""
        chunk, stop = self._chunk, start + self._size
        return tuple(range(start // chunk * chunk, -(-stop // chunk) * chunk + 1, chunk))

    def fresh_count(self, steps: Steps, held: int, common: int, wanted: int) -> int:
        """Return how many of the first ``common`` tokens of a sequence a fresh run computes alike, where it begins a step.

        Args:
            steps: of the sequence. held: tokens of it that are in the cache. wanted: the most to return.
        """
        count = 0
        most = min(held, common, wanted)
        while (following := count + self._chunk) <= most and steps.cuts(count, following) == (count, following):
            count = following
        while count % self._size:
            count -= self._chunk
        return count

    def steps_of(self, found: Found) -> Steps:
        """Return the steps in which the tokens were computed that a prompt goes on from."""
        if found.turn is None:
            return Steps(self._size, range(0, found.count, self._chunk), found.count)
        cuts = sorted({*itertools.chain.from_iterable(node.cuts for node in found.path), *found.turn.cuts})
        return Steps(self._size, cuts[:-1], cuts[-1])

    def child(self, node: Node, tokens: tuple[int, ...], cuts: tuple[int, ...]) -> Node | None:
        """Return the page behind ``node`` with these tokens, computed in these steps."""
        return next((child for child in node.children.get(tokens, ()) if child.cuts == cuts), None)

    def add(self, item: Node | Turn) -> None:
        """Put a page behind its parent, or a turn behind its page."""
        self.size += 1
        if isinstance(item, Turn):
            item.node.turns.append(item)
            return
        assert item.parent is not None
        item.parent.children.setdefault(item.tokens, []).append(item)

    def use(self, item: Node | Turn) -> None:
        """Note that something is used now."""
        self._clock += 1
        item.used = self._clock

    def resume_clock(self) -> None:
        """Count on from the last use of what was read from an index."""
        items = [item for item, _ in self.items()]
        self._clock = max((item.used for item in items), default=0)

    def remove(self, item: Node | Turn) -> list[Node | Turn]:
        """Take a page out, with all behind it, or a turn; returns what is gone."""
        if isinstance(item, Turn):
            item.node.turns.remove(item)
        else:
            assert item.parent is not None
            item.parent.used = max(item.parent.used, item.used)
            siblings = item.parent.children[item.tokens]
            siblings.remove(item)
            if not siblings:
                del item.parent.children[item.tokens]
        gone: list[Node | Turn] = [item]
        for one in gone:  # which grows by what is behind each; a conversation may be deeper than calls may nest
            one.gone = True
            if isinstance(one, Node):
                gone += [*one.turns, *itertools.chain.from_iterable(one.children.values())]
        self.size -= len(gone)
        return gone

    def oldest(self) -> Iterator[Node | Turn]:
        """Yield what can go, the least recently used first: turns, and pages that nothing is behind and no sequence holds.

        The caller removes each before it takes the next.
        """
        number = itertools.count()
        heap = [(item.used, next(number), item) for item, free in self.items() if free]
        heapq.heapify(heap)
        while heap:
            used, _, item = heapq.heappop(heap)
            node = item.node if isinstance(item, Turn) else item.parent
            yield item
            if node is not None and node.parent is not None and _is_free(node):
                heapq.heappush(heap, (max(used, node.used), next(number), node))

    def items(self) -> Iterator[tuple[Node | Turn, bool]]:
        """Yield every page and turn, and whether nothing is behind it and no sequence holds it."""
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            if node.parent is not None:
                yield node, _is_free(node)
            for turn in node.turns:
                yield turn, True
            for children in node.children.values():
                pending += children


def _is_free(node: Node) -> bool:
    return not (node.children or node.turns or node.held)
