//! `tunesmith jobs`: a server's fine-tuning jobs from the command line.

mod watch;

use std::{path::Path, process::ExitCode};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::{
    client::{Client, ServerArgs, escaped},
    files::{ago, show, text},
};

/// Create, list and watch fine-tuning jobs of a running server
#[derive(Args, Debug)]
pub(super) struct JobsArgs {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    Create(Box<CreateArgs>),
    /// List the jobs, the newest first
    List {
        /// At most so many
        #[arg(long, default_value_t = 20, value_name = "N")]
        limit: usize,
    },
    /// Show a job
    Show {
        /// ftjob-...
        id: String,
    },
    /// Follow a job to its end; exit code 0 if it succeeds
    Watch {
        /// ftjob-...
        id: String,
    },
    /// End a job
    Cancel {
        /// ftjob-...
        id: String,
    },
    /// Stop a job with a checkpoint
    Pause {
        /// ftjob-...
        id: String,
    },
    /// Let a paused job go on
    Resume {
        /// ftjob-...
        id: String,
    },
    /// Show what happened in a job, the oldest first
    Events {
        /// ftjob-...
        id: String,
        /// At most so many, the last ones
        #[arg(long, default_value_t = 100, value_name = "N")]
        limit: usize,
    },
    /// List a job's checkpoints, each a model
    Checkpoints {
        /// ftjob-...
        id: String,
    },
}

/// Create a job and print its id
#[derive(Args, Debug)]
struct CreateArgs {
    /// A file on this machine, which is uploaded, or the id of one on the server
    #[arg(long, value_name = "FILE_OR_ID")]
    training_file: String,
    /// As --training-file
    #[arg(long, value_name = "FILE_OR_ID")]
    validation_file: Option<String>,
    /// The base model, or a tuned one to go on from
    #[arg(long)]
    model: String,
    /// Part of the new model's name
    #[arg(long)]
    suffix: Option<String>,
    /// How to train
    #[arg(long, default_value = "supervised")]
    method: Method,
    /// Passes over the training file [default: the server's choice]
    #[arg(long, value_name = "N")]
    epochs: Option<u32>,
    /// Rows per step [default: the server's choice]
    #[arg(long, value_name = "N")]
    batch_size: Option<u32>,
    /// Factor on the learning rate [default: the server's choice]
    #[arg(long, value_name = "X")]
    lr_multiplier: Option<f64>,
    /// DPO's beta [default: the server's choice]
    #[arg(long)]
    beta: Option<f64>,
    /// Decides order and initial weights [default: a random one]
    #[arg(long, value_name = "N")]
    seed: Option<u32>,
    /// Name that is to point at the new model
    #[arg(long)]
    alias: Option<String>,
    /// Follow the job to its end
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Method {
    Supervised,
    Dpo,
}

/// Runs the command.
///
/// # Errors
/// The server's own words, or why it cannot be asked.
pub(super) fn run(args: &JobsArgs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.server);
    let is_json = args.server.json;
    match &args.command {
        Command::Create(create) => return create_job(&client, create, is_json),
        Command::Watch { id } => return watch::watch(&client, id, is_json),
        Command::List { limit } => {
            let jobs = client.list("/v1/fine_tuning/jobs", *limit)?;
            print_all(is_json, jobs, print_line);
        }
        Command::Show { id } => {
            // There is more to a job than fits into a line.
            println!("{:#}", client.get(&path_of(id, ""))?);
        }
        Command::Cancel { id } => change(&client, id, "cancel", is_json)?,
        Command::Pause { id } => change(&client, id, "pause", is_json)?,
        Command::Resume { id } => change(&client, id, "resume", is_json)?,
        Command::Events { id, limit } => {
            let mut events = client.list(&path_of(id, "/events"), *limit)?;
            events.reverse();
            print_all(is_json, events, |event| {
                println!(
                    "{:<20}  {:<5}  {}",
                    ago(&event["created_at"]),
                    text(event, "level"),
                    text(event, "message")
                );
            });
        }
        Command::Checkpoints { id } => {
            let checkpoints = client.list(&path_of(id, "/checkpoints"), usize::MAX)?;
            print_all(is_json, checkpoints, |checkpoint| {
                let metrics = &checkpoint["metrics"];
                println!(
                    "step {:<6}  {}{}  {}",
                    checkpoint["step_number"],
                    number("loss", &metrics["train_loss"]),
                    number("  valid loss", &metrics["full_valid_loss"]),
                    text(checkpoint, "fine_tuned_model_checkpoint"),
                );
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn create_job(client: &Client, args: &CreateArgs, is_json: bool) -> anyhow::Result<ExitCode> {
    let mut body = Map::new();
    body.insert("model".to_owned(), json!(args.model));
    body.insert("training_file".to_owned(), json!(file_id(client, &args.training_file)?));
    if let Some(file) = &args.validation_file {
        body.insert("validation_file".to_owned(), json!(file_id(client, file)?));
    }
    let mut hyperparameters = Map::new();
    for (name, value) in [
        ("n_epochs", args.epochs.map(Value::from)),
        ("batch_size", args.batch_size.map(Value::from)),
        ("learning_rate_multiplier", args.lr_multiplier.map(Value::from)),
        ("beta", args.beta.map(Value::from)),
    ] {
        if let Some(value) = value {
            hyperparameters.insert(name.to_owned(), value);
        }
    }
    let kind = match args.method {
        Method::Supervised => "supervised",
        Method::Dpo => "dpo",
    };
    body.insert(
        "method".to_owned(),
        json!({"type": kind, kind: {"hyperparameters": hyperparameters}}),
    );
    for (name, value) in [
        ("suffix", args.suffix.as_deref().map(Value::from)),
        ("seed", args.seed.map(Value::from)),
        ("alias", args.alias.as_deref().map(Value::from)),
    ] {
        if let Some(value) = value {
            body.insert(name.to_owned(), value);
        }
    }
    let job = client.post("/v1/fine_tuning/jobs", &Value::Object(body))?;
    show(is_json, &job, |job| println!("{}", text(job, "id")));
    if args.watch { watch::watch(client, text(&job, "id"), is_json) } else { Ok(ExitCode::SUCCESS) }
}

/// A file on this machine goes first; anything else is taken for an id.
fn file_id(client: &Client, file: &str) -> anyhow::Result<String> {
    let path = Path::new(file);
    if !path.is_file() {
        return Ok(file.to_owned());
    }
    let uploaded = client.upload(path, "fine-tune")?;
    let id = text(&uploaded, "id").to_owned();
    eprintln!("{file} is {id}");
    Ok(id)
}

fn change(client: &Client, id: &str, verb: &str, is_json: bool) -> anyhow::Result<()> {
    let job = client.post(&path_of(id, &format!("/{verb}")), &json!({}))?;
    show(is_json, &job, |job| println!("{id} is {}", text(job, "status")));
    Ok(())
}

fn print_line(job: &Value) {
    let model = job["fine_tuned_model"].as_str().unwrap_or(text(job, "model"));
    println!(
        "{}  {:<16}  {:<20}  {model}",
        text(job, "id"),
        text(job, "status"),
        ago(&job["created_at"])
    );
}

fn print_all(is_json: bool, objects: Vec<Value>, print: impl Fn(&Value)) {
    if is_json {
        println!("{}", Value::Array(objects));
    } else {
        objects.iter().for_each(print);
    }
}

/// `name value`, or nothing where there is no value.
fn number(name: &str, value: &Value) -> String {
    value.as_f64().map_or(String::new(), |value| format!("{name} {value:.4}"))
}

fn path_of(id: &str, rest: &str) -> String {
    format!("/v1/fine_tuning/jobs/{}{rest}", escaped(id))
}
