//! `tunesmith chat`: talk to a model in the terminal, or pipe one prompt through it.

use std::{
    io::{self, BufRead, IsTerminal, Read, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::{common::load_model, output::Stdout};
use crate::adapters::{AdapterRegistry, AdapterVersion};
use crate::engine::{
    self, EngineConfig, EngineError, EngineHandle, GenerationEvent, GenerationRequest,
    GenerationStream, RequestOptions, SamplingParams,
};
use crate::model::{KvDtype, Quantization};
use crate::ops::lora_dtype::LoraDtype;
use crate::text::{ChatTemplate, Detokenizer, Tokenizer};

/// Memory for keys and values of the one conversation, in bytes.
const KV_CACHE_BYTES: usize = 1 << 30;

/// Talk to a model and an adapter in the terminal
///
/// Reads one message from the standard input where that is no terminal. /reset forgets the
/// conversation, /exit and Ctrl-D end it.
#[derive(Args, Debug, Clone)]
pub(super) struct ChatArgs {
    /// Base model: a folder in Hub layout, or owner/name[@revision] on the Hub
    #[arg(long)]
    model: String,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_tokens: usize,
    /// 0 = the most likely token each time
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Hold the base in 8 bits, or its projections in 4: less memory, faster, a little less exact. bf16:
    /// round weights and the inputs of every product to bf16; prompts up to twice as fast on a processor
    /// with bf16 dot products
    #[arg(long, value_name = "none|bf16|int8|int4", default_value = "none")]
    quantize: Quantization,
    /// How keys and values are held: bf16 and int8 take less memory and are a little less exact
    #[arg(long, value_name = "f32|bf16|int8", default_value = "f32")]
    kv_dtype: KvDtype,
    /// How adapters are held: as they are (`auto`, `float32`), or rounded while they are loaded
    #[arg(long, value_name = "auto|float16|bfloat16|float32", default_value = "auto")]
    lora_dtype: LoraDtype,
    /// Threads of the tensor operations [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// Model or adapter that cannot be used, and a request that fails.
pub(super) fn run(args: &ChatArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.max_tokens > 0, "--max-tokens must be at least 1");
    anyhow::ensure!(args.temperature >= 0.0, "--temperature must be 0 or more");
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let mut conversation = Conversation::open(args)?;
    if io::stdin().is_terminal() {
        converse(&mut conversation)?;
    } else {
        let mut prompt = String::new();
        io::stdin().read_to_string(&mut prompt).context("reading the prompt")?;
        conversation.ask(prompt.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn converse(conversation: &mut Conversation) -> anyhow::Result<()> {
    println!("/reset forgets the conversation, /exit ends it");
    let mut lines = io::stdin().lock().lines();
    loop {
        print!("> ");
        Stdout(io::stdout()).flush()?;
        let Some(line) = lines.next().transpose()? else {
            println!();
            return Ok(());
        };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            "/reset" => conversation.reset(),
            command if command.starts_with('/') => println!("no such command: {command}"),
            message => {
                if let Err(error) = conversation.ask(message) {
                    eprintln!("error: {error:#}");
                }
            }
        }
    }
}

/// A model, and what was said so far.
struct Conversation {
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    adapter: Option<Arc<AdapterVersion>>,
    stop_token_ids: Vec<u32>,
    max_tokens: usize,
    temperature: f32,
    system: Option<String>,
    messages: Vec<Value>,
}

impl Conversation {
    fn open(args: &ChatArgs) -> anyhow::Result<Self> {
        let model = load_model(&args.model, args.quantize.into())?;
        let stop_token_ids = model.stop_token_ids();
        let decoder = Arc::new(model.decoder);
        let registry = AdapterRegistry::new(decoder.config().clone())
            .with_base(&decoder)
            .with_dtype(args.lora_dtype);
        let load = |dir: &PathBuf| {
            let (version, _) = registry
                .load("tuned", dir, false)
                .with_context(|| format!("--adapter {}", dir.display()))?;
            anyhow::Ok(version)
        };
        let adapter = args.adapter.as_ref().map(load).transpose()?;
        let config = EngineConfig::for_cache(decoder.config(), 1, KV_CACHE_BYTES, args.kv_dtype);
        let mut conversation = Self {
            stop_token_ids,
            engine: engine::spawn(decoder, config)?,
            tokenizer: Arc::clone(AdapterVersion::tokenizer_of(adapter.as_ref(), &model.tokenizer)),
            template: model.template,
            adapter,
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            system: args.system.clone(),
            messages: Vec::new(),
        };
        conversation.reset();
        Ok(conversation)
    }

    fn reset(&mut self) {
        let system = self.system.iter();
        self.messages = system.map(|text| json!({"role": "system", "content": text})).collect();
    }

    /// Prints the answer to `message` while it is written. A message that fails is forgotten.
    fn ask(&mut self, message: &str) -> anyhow::Result<()> {
        let num_before = self.messages.len();
        self.messages.push(json!({"role": "user", "content": message}));
        match self.answer() {
            Ok(answer) => {
                self.messages.push(json!({"role": "assistant", "content": answer}));
                Ok(())
            }
            Err(error) => {
                self.messages.truncate(num_before);
                Err(error)
            }
        }
    }

    fn answer(&self) -> anyhow::Result<String> {
        let prompt = self.template.render(&self.messages, None, true, &Map::new())?;
        let prompt = self.tokenizer.encode(&prompt, false)?;
        let mut detokenizer = Detokenizer::new(Arc::clone(&self.tokenizer), &prompt);
        let mut stream = self.start(prompt)?;
        let mut out = Stdout(io::stdout());
        let mut answer = String::new();
        let mut show = |piece: String| -> io::Result<()> {
            answer.push_str(&piece);
            out.write_all(piece.as_bytes())?;
            out.flush()
        };
        while let Some(event) = stream.blocking_next() {
            match event {
                GenerationEvent::Token { id, .. } => show(detokenizer.push(id)?)?,
                GenerationEvent::Finished { .. } => show(detokenizer.finish()?)?,
                GenerationEvent::Failed { message } => bail!(message),
                GenerationEvent::PromptScores(_) => {}
            }
        }
        writeln!(out)?;
        Ok(answer)
    }

    /// Asks for as many tokens as there is room for.
    fn start(&self, prompt: Vec<u32>) -> anyhow::Result<GenerationStream> {
        let limit = self.engine.config().max_sequence_len();
        let room = limit.saturating_sub(prompt.len());
        if room == 0 {
            let num_tokens = prompt.len();
            let full = EngineError::TooLong { prompt: num_tokens, max_tokens: 1, limit };
            return Err(full).context("the conversation is full; /reset starts a new one");
        }
        // Another seed each time, or a question asked twice would get one answer.
        let seed = self.messages.len() as u64 ^ u64::from(std::process::id()) << 16;
        let temperature = self.temperature;
        let sampling = SamplingParams { temperature, seed, ..SamplingParams::greedy() };
        Ok(self.engine.generate(GenerationRequest {
            prompt,
            adapter: self.adapter.clone(),
            sampling,
            max_tokens: self.max_tokens.min(room),
            stop_token_ids: self.stop_token_ids.clone(),
            score_prompt: false,
            options: RequestOptions::default(),
        })?)
    }
}
