"""The implementation of the Qwen Distillation Lab, one module a stage; `distill_app` is the public door."""
