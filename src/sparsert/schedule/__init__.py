"""What is to be computed (a task), how (a schedule), and the cost model that chooses."""
