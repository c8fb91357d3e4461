# The image of target cpu-docker: `transformers serve` on a CPU, in the versions and with the hashes of the locks.
#   docker build --tag requant-engine:cpu --file envs/engine.Dockerfile envs
# BASE is any image with Python 3.11 and venv. TORCH=cuda takes the build of torch that pip's usual index has, 5 GB;
# for cpu, PIP_EXTRA_INDEX_URL names an index that has torch's CPU builds, unless pip's own does.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH=cpu
ARG PIP_EXTRA_INDEX_URL
COPY build.lock requirements.lock torch-${TORCH}.lock /locks/
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /engine \
 && /engine/bin/pip install --require-hashes --no-deps -r /locks/build.lock \
 && /engine/bin/pip install --require-hashes --no-deps --no-build-isolation -r /locks/requirements.lock \
 && /engine/bin/pip install --require-hashes --no-deps -r /locks/torch-${TORCH}.lock \
 && /engine/bin/pip check
ENV PATH=/engine/bin:$PATH HOME=/tmp
USER 65534:65534
