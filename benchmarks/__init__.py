"""What is measured against peers. `stu-bench NAME` prints JSON; ratios come from one run."""
