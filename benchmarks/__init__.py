"""What is measured against peers. Each module prints JSON; ratios come from one run."""
