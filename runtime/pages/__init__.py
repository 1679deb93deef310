"""The page manager and what it manages: arena, page table, policies, budget."""
