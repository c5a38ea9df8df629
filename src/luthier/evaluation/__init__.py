"""Evaluation: likelihood and calibration as streaming sums, generation with verifiers, the sandbox, lm-eval."""
