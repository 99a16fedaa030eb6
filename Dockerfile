# Urchin with its default model: docker build -t urchin . && docker run -p 127.0.0.1:8080:8080 urchin
# More models: docker run -v /path/to/models:/models/mine ... urchin /models/mine/NAME
FROM debian:12-slim AS build
WORKDIR /src
COPY deploy/setup deploy/fetch-model deploy/
RUN apt-get update && apt-get install -y --no-install-recommends make
RUN deploy/setup python3-pip && URCHIN_CACHE=/models deploy/fetch-model
COPY Makefile ./
RUN make packages
COPY . .
RUN make && make install PREFIX=/usr DESTDIR=/install

FROM debian:12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl libmicrohttpd12 libcjson1 libjemalloc2 libpcre2-8-0 libutf8proc2 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /models --no-create-home urchin
COPY --from=build /install /
COPY --from=build --chown=urchin /models /models
ENV URCHIN_CACHE=/models
USER urchin
VOLUME /models
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s CMD curl -fsSo /dev/null http://127.0.0.1:${URCHIN_PORT:-8080}/health || exit 1
STOPSIGNAL SIGTERM
ENTRYPOINT ["urchin", "serve", "--host", "0.0.0.0"]
