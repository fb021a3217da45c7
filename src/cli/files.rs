//! `tunesmith files`: a server's files from the command line.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use base64::{engine::general_purpose::STANDARD, read::DecoderReader};
use clap::{Args, Subcommand};
use indicatif::{BinaryBytes, HumanDuration};
use serde_json::Value;

use super::{
    client::{Client, ServerArgs, escaped},
    output::Stdout,
};
use crate::jobs::unix_seconds;

/// Upload, list and fetch files of a running server
#[derive(Args, Debug)]
pub(super) struct FilesArgs {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Upload a file and print its id
    Upload {
        /// The file
        path: PathBuf,
        /// What it is for
        #[arg(long, default_value = "fine-tune")]
        purpose: String,
    },
    /// List the files, the newest first
    List {
        /// Only those for this
        #[arg(long)]
        purpose: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 10_000, value_name = "N")]
        limit: usize,
    },
    /// Show a file
    Show {
        /// file-...
        id: String,
    },
    /// Fetch a file's content; results come as plain CSV
    Download {
        /// file-...
        id: String,
        /// Where to write it [default: the standard output]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Delete a file
    Delete {
        /// file-...
        id: String,
    },
}

/// Runs the command.
///
/// # Errors
/// The server's own words, or why it cannot be asked.
pub(super) fn run(args: &FilesArgs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.server);
    let is_json = args.server.json;
    match &args.command {
        Command::Upload { path, purpose } => {
            let file = client.upload(path, purpose)?;
            show(is_json, &file, |file| println!("{}", text(file, "id")));
        }
        Command::List { purpose, limit } => {
            let filter = purpose.as_ref().map(|purpose| format!("?purpose={}", escaped(purpose)));
            let path = format!("/v1/files{}", filter.unwrap_or_default());
            let files = client.list(&path, *limit)?;
            if is_json {
                println!("{}", Value::Array(files));
            } else {
                files.iter().for_each(print_line);
            }
        }
        Command::Show { id } => {
            show(is_json, &client.get(&path_of(id))?, print_line);
        }
        Command::Download { id, output } => download(&client, id, output.as_ref())?,
        Command::Delete { id } => {
            let deleted = client.delete(&path_of(id))?;
            show(is_json, &deleted, |_| println!("{id} is deleted"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn download(client: &Client, id: &str, output: Option<&PathBuf>) -> anyhow::Result<()> {
    let file = client.get(&path_of(id))?;
    let content = client.download(&format!("{}/content", path_of(id)))?;
    let mut content: Box<dyn Read> = if file["purpose"] == "fine-tune-results" {
        Box::new(DecoderReader::new(content, &STANDARD))
    } else {
        Box::new(content)
    };
    match output {
        Some(path) => {
            let context = || path.display().to_string();
            let mut target = File::create(path).with_context(context)?;
            io::copy(&mut content, &mut target).with_context(context)?;
        }
        None => {
            let mut target = Stdout(io::stdout());
            io::copy(&mut content, &mut target)?;
            target.flush()?;
        }
    }
    Ok(())
}

fn print_line(file: &Value) {
    println!(
        "{}  {:>10}  {:<17}  {:<20}  {}",
        text(file, "id"),
        BinaryBytes(file["bytes"].as_u64().unwrap_or(0)).to_string(),
        text(file, "purpose"),
        ago(&file["created_at"]),
        text(file, "filename"),
    );
}

/// An object as it is, or as `print` shows it to people.
pub(super) fn show(is_json: bool, object: &Value, print: impl FnOnce(&Value)) {
    if is_json {
        println!("{object}");
    } else {
        print(object);
    }
}

/// A field that is text.
pub(super) fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object[field].as_str().unwrap_or_default()
}

/// Unix seconds as a time before now.
pub(super) fn ago(seconds: &Value) -> String {
    let elapsed = unix_seconds().saturating_sub(seconds.as_u64().unwrap_or(0));
    format!("{} ago", HumanDuration(Duration::from_secs(elapsed)))
}

fn path_of(id: &str) -> String {
    format!("/v1/files/{}", escaped(id))
}
