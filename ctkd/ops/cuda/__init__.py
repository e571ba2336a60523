"""Operations on float32, bfloat16 and float16 rows on a CUDA device, by Triton kernels."""
