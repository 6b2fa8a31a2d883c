# TPAW on an NVIDIA GPU, with vLLM in an environment of its own. Nobody has built this image yet.
#
#   docker build -t tpaw .
#   docker run --gpus all -v "$PWD:/work" tpaw run mine.yaml
#
# For generation by vLLM, as docs/how-to/vllm.md says, with this program:
#   generate: {backend: server, server: {command: "/opt/vllm/bin/vllm serve {model} --port {port} …"}}
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc git \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/vllm && /opt/vllm/bin/pip install --no-cache-dir vllm==0.32.0
# Only what the wheel is built from: a working copy also holds environments and runs.
COPY pyproject.toml README.md LICENSE constraints.txt /opt/tpaw/
COPY src /opt/tpaw/src
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --constraint /opt/tpaw/constraints.txt '/opt/tpaw[baselines,evaluate,judge,lora,qlora,ray,trackers]'
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["tpaw"]
CMD ["--help"]
