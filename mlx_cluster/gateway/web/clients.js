// How other programs are pointed at this gateway. Owns: the snippets. `at` is {base, model, context}.

const quoted = (text) => JSON.stringify(text);

export const CLIENTS = [
  {
    name: "OpenAI SDK",
    where: "Python: pip install openai",
    text: ({ base, model }) => `from openai import OpenAI

client = OpenAI(base_url=${quoted(`${base}/v1`)}, api_key="none")
stream = client.chat.completions.create(
    model=${quoted(model)},
    messages=[{"role": "user", "content": "Hello"}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
`,
  },
  {
    name: "Open WebUI",
    where: "In a shell, where Open WebUI is installed. In a container, name its host in api_gateway.allowed_hosts.",
    text: ({ base }) => `export OPENAI_API_BASE_URL=${shell(`${base}/v1`)}
export OPENAI_API_KEY=none
export ENABLE_OLLAMA_API=false
open-webui serve
`,
  },
  {
    name: "Claude Code",
    where: "In a shell",
    text: ({ base, model }) => `export ANTHROPIC_BASE_URL=${shell(base)}
export ANTHROPIC_AUTH_TOKEN=none
export ANTHROPIC_MODEL=${shell(model)}
export ANTHROPIC_DEFAULT_HAIKU_MODEL=${shell(model)}
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
claude
`,
  },
  {
    name: "Codex",
    where: "~/.codex/config.toml",
    text: ({ base, model, context }) => `model = ${quoted(model)}
model_provider = "mlx-cluster"
${context ? `model_context_window = ${context}\n` : ""}
[model_providers.mlx-cluster]
name = "mlx-cluster"
base_url = ${quoted(`${base}/v1`)}
wire_api = "responses"
`,
  },
  {
    name: "Continue",
    where: "~/.continue/config.yaml",
    text: ({ base, model, context }) => `name: mlx-cluster
version: 1.0.0
schema: v1
models:
  - name: ${quoted(model)}
    provider: openai
    model: ${quoted(model)}
    apiBase: ${quoted(`${base}/v1`)}
    apiKey: none
    roles: [chat, edit, apply]
${context ? `    defaultCompletionOptions:\n      contextLength: ${context}\n` : ""}`,
  },
  {
    name: "curl",
    where: "In a shell",
    text: ({ base, model }) => `curl -N ${shell(`${base}/v1/chat/completions`)} \\
  -H 'Content-Type: application/json' \\
  -d ${shell(JSON.stringify({ model, stream: true, messages: [{ role: "user", content: "Hello" }] }))}
`,
  },
];

function shell(text) {
  return /^[\w.:\/@-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}
