# The serving image, without torch: docker build --tag depo-gateway/gateway:0.1.0 .
# PYTHON_IMAGE may name a mirror or a digest: --build-arg PYTHON_IMAGE=registry.example/python@sha256:…
ARG PYTHON_IMAGE=docker.io/library/python:3.11.15-slim-trixie

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY docker docker
COPY depo_gateway depo_gateway
COPY estimator estimator
COPY gateway gateway
COPY training training
RUN docker/install serving /opt/depo-gateway /usr/share/doc/depo-gateway/sbom.cdx.json

FROM ${PYTHON_IMAGE}
# A running container installs nothing and becomes root nowhere: pip, the wheels that could restore it and all set-user-id
# bits are removed.
RUN groupadd --gid 10001 depo \
  && useradd --uid 10001 --gid depo --home-dir /tmp --no-create-home --shell /usr/sbin/nologin depo \
  && python -m pip uninstall --yes setuptools wheel pip \
  && rm -rf /usr/local/lib/python3.*/ensurepip \
  && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /usr/share/doc/depo-gateway /usr/share/doc/depo-gateway
COPY --from=build /opt/depo-gateway /opt/depo-gateway
# malloc returns memory after large bodies; by default it would keep the peak.
ENV PATH=/opt/depo-gateway/bin:$PATH \
  MALLOC_TRIM_THRESHOLD_=131072 \
  PYTHONDONTWRITEBYTECODE=1 \
  PYTHONUNBUFFERED=1
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="depo-gateway" \
  org.opencontainers.image.description="OpenAI-compatible gateway that sends each query to the cheapest model that will do" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}"
USER 10001:10001
EXPOSE 8000 9000
ENTRYPOINT ["depo-gateway"]
CMD ["serve", "--config", "/etc/depo-gateway/gateway.yaml"]
