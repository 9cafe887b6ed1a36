# An image of `tokenloom serve` for the CPU. Not built on the machine where it was written.
#
#   docker build -t tokenloom .
#   openssl rand -hex 32 > key.txt
#   docker run --stop-timeout 45 -p 127.0.0.1:8000:8000 -v "$PWD/key.txt:/run/key.txt:ro" tokenloom
#   docker run --stop-timeout 45 -p 127.0.0.1:8000:8000 -v "$PWD/key.txt:/run/key.txt:ro" -v "$PWD/demo/model:/model:ro" tokenloom \
#       serve /model --host 0.0.0.0 --api-key-file /run/key.txt
#
# Inside a container the server listens on all addresses, so it needs a key. The file must be readable by user 10001.

FROM python:3.11-slim AS build
COPY . /source
# the wheel of torch for the CPU alone is a tenth of the default one
RUN python -m venv /opt/tokenloom \
    && /opt/tokenloom/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && /opt/tokenloom/bin/pip install --no-cache-dir -c /source/constraints.txt '/source[serve]'

FROM python:3.11-slim
COPY --from=build /opt/tokenloom /opt/tokenloom
# libgomp: threads of torch; Numba keeps what it compiles in its cache folder
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home tokenloom
USER tokenloom
ENV PATH=/opt/tokenloom/bin:$PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/home/tokenloom/.cache/numba
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["tokenloom"]
CMD ["serve", "--host", "0.0.0.0", "--api-key-file", "/run/key.txt"]
