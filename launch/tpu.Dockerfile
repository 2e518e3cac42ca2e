# contextdiff_jax on TPU hosts. Built by nobody yet; checked by tests/test_accelerator.py.
#   docker build -f launch/tpu.Dockerfile -t contextdiff-tpu . && docker run --privileged --net=host contextdiff-tpu
FROM python:3.12-slim-bookworm

WORKDIR /contextdiff
COPY requirements.txt requirements-tpu.txt ./
RUN pip install --no-cache-dir -r requirements-tpu.txt
COPY . .
ENV PYTHONPATH=/contextdiff
CMD ["python", "-m", "contextdiff_jax.benchmark", "--mode=facts"]
