# mimstream on an NVIDIA GPU, as a user without rights.
#
#   docker build -t mimstream .
#   docker run --rm --gpus all --shm-size=8g mimstream doctor
#   docker run --rm --gpus all --shm-size=8g -v "$PWD:/work" --user "$(id -u):$(id -g)" mimstream train RECIPE key=value ...
#
# The base image has the driver's interface alone: torch's wheels bring CUDA, cuDNN and NCCL with them, and two copies
# would make the image twice as large. Loader workers pass batches through /dev/shm, hence --shm-size.

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build
# hadolint ignore=DL3008  # the distribution's security updates are wanted
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/mimstream
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY tokenizer tokenizer
COPY mim mim
RUN /opt/mimstream/bin/pip install --constraint constraints.txt ".[fast,trackers]"

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 mim \
    && mkdir /work \
    && chown mim:mim /work
COPY --from=build /opt/mimstream /opt/mimstream
ENV PATH=/opt/mimstream/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
USER 10001
WORKDIR /work
STOPSIGNAL SIGTERM
ENTRYPOINT ["mim"]
CMD ["--help"]
