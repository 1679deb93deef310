"""Pages that are mostly pruned, merged: which ones go together, and what the page that takes their place holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.codec import unpack_hot, unpack_warm
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import Kernels
from .manager import PageManager
from .policy import candidates

Bytes = NDArray[np.uint8]
Int = NDArray[np.int64]


def merge_pages(manager: PageManager, layer: int) -> int:
    """Merge pages of a layer that are mostly pruned, sealed, in RAM and not pinned; returns how many are free now.

    The first page of a group takes the live tokens of the others in its dead slots.
    """
    table, spec, options = manager.table, manager.spec, manager.options
    size = spec.page_size
    if options.merge_layers is not None and layer not in options.merge_layers:
        return 0
    freed = 0
    for tier, page_bytes in ((Tier.HOT, spec.hot_bytes), (Tier.WARM, spec.warm_bytes)):
        chosen = sorted(page for at, page in candidates(table, options, tier, unpinned=True) if at == layer)
        live = {page: table.live(layer, page) for page in chosen}
        sparse = [page for page in chosen if 2 * live[page].size <= size]
        for first, *others in merge_groups(sparse, [live[page].size for page in sparse], size):
            dead = np.setdiff1d(np.arange(size), live[first])
            stops = np.cumsum([live[page].size for page in others])
            targets = [live[first], *np.split(dead[: stops[-1]], stops[:-1])]
            group = [first, *others]
            contents = [manager.arena.page(int(table.offset[layer, page]), page_bytes) for page in group]
            slots = [live[page] for page in group]
            content = merged_page(spec, manager.kernels, contents, slots, targets, hot=tier == Tier.HOT)
            for page, places in zip(others, targets[1:], strict=True):
                table.move(layer, page * size + live[page], first * size + places)
                table.mass[layer, first] += table.mass[layer, page]
                manager.free_page(layer, page)
            manager.replace(layer, first, content)
            freed += len(others)
    manager.counters.pages_merged += freed
    return freed


def merge_groups(pages: list[int], live: list[int], page_size: int) -> list[list[int]]:
    """Put pages together whose live slots fit one page: first fit, in logical order.

    A group of one is left out. So is one that would fill half a page or less: it waits for more, so that a token is not
    quantised again for little.

    Args:
        pages: in logical order. live: live slots of each.
    """
    groups: list[tuple[list[int], int]] = []
    for page, count in zip(pages, live, strict=True):
        for index, (members, total) in enumerate(groups):
            if total + count <= page_size:
                groups[index] = ([*members, page], total + count)
                break
        else:
            groups.append(([page], count))
    return [members for members, total in groups if len(members) > 1 and 2 * total > page_size]


def merged_page(
    spec: PageSpec, kernels: Kernels, contents: list[Bytes], slots: list[Int], targets: list[Int], *, hot: bool
) -> Bytes:
    """Return a page with the live slots of several pages of one tier.

    fp16 pages are copied as they are. INT8 pages are decoded and quantised once more: the error of a key grows by at most half
    a step of the new scale, which is at most the largest of the old ones (rounded up); that of a value likewise.

    Args:
        contents: the pages. slots: the live slots of each. targets: where they go.
    """
    shape = (spec.n_kv_heads, spec.head_dim, spec.page_size)
    unpack = unpack_hot if hot else unpack_warm
    result = np.zeros(spec.hot_bytes, np.uint8)
    for content, taken, places in zip(contents, slots, targets, strict=True):
        keys, values = (np.ascontiguousarray(part[:, taken].transpose(1, 0, 2)) for part in unpack(content, *shape))
        for index, place in enumerate(places.tolist()):
            one = slice(index, index + 1)
            kernels.write_hot(result, place, keys[one], values[one], spec.page_size)
    if hot:
        return result
    packed = np.zeros(spec.warm_bytes, np.uint8)
    kernels.pack_warm(result, packed, *shape, spec.page_size)
    return packed
