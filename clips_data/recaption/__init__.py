"""Makes caption columns with an MLLM."""
