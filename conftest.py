"""What is not collected for its examples."""

# It has none, and a first import without TRITON_INTERPRET=1 would compile the kernels that tests interpret; Triton may
# be missing, too.
collect_ignore = ["src/rarefy/kernels/gpu/block_kernels.py"]
