// Streams one answer through each official client; prints one JSON line per client: {client, text, …}.
// Environment: BASE_URL (with /v1), API_KEY, MODEL.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, jsonSchema, streamText } from "ai";
import OpenAI from "openai";

const { BASE_URL: baseURL, API_KEY: apiKey, MODEL: model } = process.env;
const prompt = "Say hello.";
const report = (client, fields) => console.log(JSON.stringify({ client, ...fields }));

async function openaiChat() {
  const client = new OpenAI({ baseURL, apiKey });
  const stream = await client.chat.completions.create({
    model,
    messages: [{ role: "user", content: prompt }],
    max_tokens: 24,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let pieces = 0;
  let usage = null;
  for await (const chunk of stream) {
    const piece = chunk.choices[0]?.delta?.content ?? "";
    if (piece) pieces += 1;
    text += piece;
    usage = chunk.usage ?? usage;
  }
  report("openai", { text, pieces, usage });
}

async function openaiResponses() {
  const client = new OpenAI({ baseURL, apiKey });
  const stream = await client.responses.create({ model, input: prompt, max_output_tokens: 24, stream: true });
  let text = "";
  let last = "";
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event.type;
  }
  report("openai-responses", { text, last });
}

// `provider.chat(model)` posts to /chat/completions, plain `provider(model)` to /responses.
async function aiSdk(name, languageModel) {
  const parts = [];
  const errors = [];
  const result = streamText({
    model: languageModel,
    messages: [{ role: "user", content: prompt }],
    temperature: 0.7,
    maxOutputTokens: 24,
    stopSequences: [],
    onError: ({ error }) => errors.push(String(error)),
  });
  for await (const part of result.textStream) parts.push(part);
  report(name, { text: parts.join(""), pieces: parts.length, finish: await result.finishReason, errors });
}

async function aiSdkObject(languageModel) {
  const schema = jsonSchema({
    type: "object",
    properties: { colour: { type: "string", enum: ["red", "green", "blue"] } },
    required: ["colour"],
    additionalProperties: false,
  });
  const { object } = await generateObject({ model: languageModel, schema, prompt: "Name a colour.", maxOutputTokens: 60 });
  report("ai-sdk-object", { object });
}

const provider = createOpenAI({ baseURL, apiKey });
await openaiChat();
await openaiResponses();
await aiSdk("ai-sdk-chat", provider.chat(model));
await aiSdk("ai-sdk-responses", provider(model));
await aiSdkObject(provider.chat(model));
