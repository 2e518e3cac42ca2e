# contextdiff_jax on NVIDIA GPUs. Built by nobody yet; checked by tests/test_accelerator.py.
#   docker build -f launch/cuda.Dockerfile -t contextdiff-cuda . && docker run --gpus all contextdiff-cuda \
#     python -m contextdiff_jax.benchmark --mode=accelerator --minutes=8 --json=/tmp/accelerator.json
FROM python:3.12-slim-bookworm

WORKDIR /contextdiff
COPY requirements.txt requirements-cuda.txt ./
# CUDA itself comes in the wheels of jax[cuda13]; the host needs its driver alone.
RUN pip install --no-cache-dir -r requirements-cuda.txt
COPY . .
ENV PYTHONPATH=/contextdiff
CMD ["python", "-m", "contextdiff_jax.benchmark", "--mode=facts"]
