"""The device side: pages, tiers, policies, engines and the token loop. Never imports torch."""

if __name__ != "edgekv.runtime":
    raise ImportError("import this package as edgekv.runtime")
