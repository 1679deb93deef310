"""Sessions and prefixes: tokens and pages that outlive a run."""
