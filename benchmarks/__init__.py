"""What is measured against peers. `benchmarks NAME` prints JSON; ratios come from one run."""
