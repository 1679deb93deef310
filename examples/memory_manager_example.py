"""The memory manager, step by step: what a small budget does to a growing cache.

Run it with ./run_memory_manager.sh, or: python examples/memory_manager_example.py --memory-mb 2
"""

from __future__ import annotations

import argparse

import numpy as np

from edgekv import EdgeKVError, MemoryManager

MODEL = {"num_layers": 4, "num_kv_heads": 4, "head_dim": 64}


def show(title: str, manager: MemoryManager) -> None:
    stats = manager.get_stats()
    pages = ", ".join(f"{count} {tier}" for tier, count in stats["pages_by_tier"].items() if count)
    print(f"\n{title}")
    print(f"  tokens {stats['tokens']}, pages: {pages or 'none'}")
    print(f"  memory {stats['bytes_in_memory'] / 2**20:.2f} of {stats['budget_bytes'] / 2**20:.2f} MiB")
    print(
        f"  so far: {stats['pages_compressed']} compressed, {stats['pages_offloaded']} offloaded,"
        f" {stats['pages_fetched']} fetched, {stats['bytes_written'] / 2**20:.2f} MiB written"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-mb", type=float, default=2, help="budget in MiB (default: 2)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to generate (default: 1024)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page (default: 16)")
    arguments = parser.parse_args()

    # 1. Initialisation: one allocation, at the size of the budget.
    manager = MemoryManager(
        max_memory_mb=arguments.memory_mb,
        page_size=arguments.page_size,
        quantization_enabled=True,
        memory_threshold_percent=90,
    )
    manager.initialize_kv_cache(MODEL)
    show("1. initialised", manager)

    # 2. Autoregressive generation: every step adds one token to every layer.
    random = np.random.default_rng(0)
    shape = (arguments.tokens, MODEL["num_layers"], 1, MODEL["num_kv_heads"], MODEL["head_dim"])
    keys, values = random.standard_normal((2, *shape)).astype(np.float32)
    for token in range(arguments.tokens):
        for layer in range(MODEL["num_layers"]):
            manager.add_to_kv_cache(
                layer_idx=layer, key=keys[token, layer], value=values[token, layer], token_indices=[token]
            )
        if token + 1 in (arguments.tokens // 8, arguments.tokens // 2, arguments.tokens):
            # 3. Above the threshold pages are compressed to INT8, then the least recently used go to flash.
            show(f"2. after {token + 1} tokens", manager)

    # 4. Pruning: a page whose tokens are all gone is freed at once, in every tier.
    pruned = range(arguments.page_size * 2, arguments.page_size * 6)
    manager.remove_pruned_tokens(pruned)
    show(f"3. after pruning tokens {pruned.start} to {pruned.stop - 1}", manager)

    # 5. Retrieval: fetched from flash and dequantised by itself.
    wanted = [0, arguments.page_size, arguments.tokens - 1]
    k, _ = manager.get_from_kv_cache(layer_idx=0, token_indices=wanted)
    error = np.abs(k - keys[wanted, 0, 0]).max()
    show(f"4. after reading tokens {wanted}: largest error of a key {error:.4f}", manager)
    for token in wanted:
        print(f"  token {token} is in {manager.locate(layer_idx=0, token_index=token)['tier']} memory")

    # 6. A token that is gone is an error that names it, never a wrong value.
    try:
        manager.get_from_kv_cache(layer_idx=0, token_indices=[pruned.start])
    except EdgeKVError as gone:
        print(f"\n5. asking for a pruned token: {gone}")
    manager.close()


if __name__ == "__main__":
    main()
