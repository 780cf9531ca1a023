#!/usr/bin/env bash
# The API with nothing but curl.
#
#   examples/curl.sh [BASE_URL] [MODEL]        # http://127.0.0.1:8000 and demo, when left out
set -euo pipefail
url="${1:-${MLX_CLUSTER_URL:-http://127.0.0.1:8000}}"
model="${2:-${MLX_CLUSTER_MODEL:-demo}}"

post() {
  curl --silent --show-error --fail-with-body --no-buffer "$url$1" -H 'Content-Type: application/json' -d "$2"
  echo
}

echo "--- the models"
curl --silent --show-error --fail-with-body "$url/v1/models"
echo

echo "--- a chat"
post /v1/chat/completions '{"model": "'"$model"'", "temperature": 0, "max_tokens": 60,
  "messages": [{"role": "user", "content": "What is a stage?"}]}'

echo "--- the same, streamed"
post /v1/chat/completions '{"model": "'"$model"'", "temperature": 0, "max_tokens": 60, "stream": true,
  "messages": [{"role": "user", "content": "What is a stage?"}]}'

echo "--- one of three words"
post /v1/chat/completions '{"model": "'"$model"'", "guided_choice": ["low", "medium", "high"],
  "messages": [{"role": "user", "content": "How bad is it?"}]}'

echo "--- Anthropic's form"
post /v1/messages '{"model": "'"$model"'", "max_tokens": 60, "temperature": 0,
  "messages": [{"role": "user", "content": "What is a stage?"}]}'

echo "--- token ids"
post /tokenize '{"model": "'"$model"'", "prompt": "What is a stage?"}'
