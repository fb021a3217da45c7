// The steps of OpenAI's fine-tuning cookbook with openai-node.
//
//   npm install openai
//   node tests/clients/fine_tuning.mjs http://127.0.0.1:8000 [tiny-kitchen]
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import { join, dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import assert from 'node:assert/strict';

// Found from where it is called, so that the package need not lie beside this file.
const require = createRequire(join(process.cwd(), 'x.js'));
const { OpenAI, toFile } = require('openai');

const [url, model = 'tiny-kitchen'] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none' });
const data = join(dirname(fileURLToPath(import.meta.url)), '../../models/recipe-assistant');
const lines = (name, count) =>
  readFileSync(join(data, `${name}.jsonl`), 'utf8').split('\n').slice(0, count);

const upload = async (name, rows) =>
  client.files.create({
    file: await toFile(Buffer.from(rows.join('\n')), name),
    purpose: 'fine-tune',
  });
const train = await upload('train.jsonl', lines('train', 64));
const valid = await upload('valid.jsonl', lines('valid', 20));
console.log('files:', train.id, valid.id);

let job = await client.fineTuning.jobs.create({
  model,
  training_file: train.id,
  validation_file: valid.id,
  suffix: 'node',
  metadata: { from: 'node' },
  method: {
    type: 'supervised',
    supervised: { hyperparameters: { n_epochs: 2, batch_size: 8, learning_rate_multiplier: 10 } },
  },
});
while (!['succeeded', 'failed', 'cancelled'].includes(job.status)) {
  await new Promise((resolve) => setTimeout(resolve, 1000));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
assert.equal(job.status, 'succeeded', JSON.stringify(job.error));
const events = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 5 })) {
  events.push(event.message);
}
console.log(`${events.length} events, the last: ${events[0]}`);
const checkpoints = await client.fineTuning.jobs.checkpoints.list(job.id);
console.log('checkpoints:', checkpoints.data.map((c) => c.fine_tuned_model_checkpoint));
const content = await (await client.files.content(job.result_files[0])).text();
const csv = Buffer.from(content, 'base64').toString();
assert.match(csv, /^step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,/);

const row = JSON.parse(lines('test', 1)[0]);
const stream = await client.chat.completions.create({
  model: job.fine_tuned_model,
  messages: row.messages.slice(0, -1),
  temperature: 0,
  max_tokens: 64,
  stream: true,
});
let text = '';
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? '';
console.log(`${job.fine_tuned_model}: ${text}`);
assert.ok((await client.fineTuning.jobs.list({ metadata: { from: 'node' } })).data.length > 0);
assert.ok((await client.models.delete(job.fine_tuned_model)).deleted);
assert.ok((await client.files.delete(train.id)).deleted);
console.log('ok');
