"""The tree of pages that requests share."""

from __future__ import annotations

from edgekv.runtime.serving.tree import Found, Node, Tree, Turn


def test_a_conversation_deeper_than_calls_may_nest_is_found_and_forgotten_as_any_other() -> None:
    tree, pages = Tree(4, 4, exact=False), 3000
    nodes = [tree.root(b"")]
    for number in range(1, pages + 1):
        start = 4 * (number - 1)
        nodes.append(Node(number, nodes[-1], (1, 2, 3, 4), (start, start + 4), (number,)))
        tree.add(nodes[-1])
    turn = Turn(pages + 1, nodes[-1], (5,), 4 * pages, ())
    tree.add(turn)
    assert tree.size == pages + 1
    prompt = [1, 2, 3, 4] * pages + [5, 6]
    assert tree.find(b"", prompt) == Found(4 * pages, tuple(nodes[1:]), None)
    assert tree.find(b"", prompt[:9]) == Found(8, tuple(nodes[1:3]), None)
    assert tree.find(b"other", prompt) == Found(0)
    gone = tree.remove(nodes[1])
    assert [item.number for item in gone if isinstance(item, Node)] == list(range(1, pages + 1))
    assert turn in gone
    assert all(item.gone for item in gone)
    assert (tree.size, list(tree.items())) == (0, [])
    assert tree.find(b"", prompt) == Found(0)
