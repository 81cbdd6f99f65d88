//! `close-sync publish`: events from a file or a pipe to the exchange, as a producer would.

use std::collections::VecDeque;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use lapin::BasicProperties;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};

use crate::amqp::publisher::{self, Publisher, Sent};
use crate::amqp::{self, BrokerError, Settings, topology};
use crate::cli::{Failure, INPUT};
use crate::domain::event::{Event, Malformed};
use crate::text::count;

/// Publish events, one JSON object per line, as a producer would.
///
/// Each message is persistent, mandatory and confirmed, in the order of the lines, and carries
/// `message_id` (the event's `messageId`, else a new one), `type`, `timestamp` and `content_type`. Its routing
/// key is the event's type, `identify` without one. A
/// line that is no JSON object, or has an envelope of the wrong shape, is not published but reported
/// with its number; the exit code is 2 then. Whether an event names somebody depends on the worker's
/// mapping and is not checked here.
#[derive(clap::Args)]
pub(super) struct Args {
    /// A file with one JSON object per line, or `-` for standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Publish every line as it is, also what is no event: to see what becomes of it.
    #[arg(long)]
    unchecked: bool,
    /// The routing key of all of them, instead of each event's type.
    #[arg(long, value_name = "KEY", value_parser = routing_key)]
    routing_key: Option<String>,
}

/// AMQP bounds it.
fn routing_key(text: &str) -> Result<String, String> {
    if text.len() <= 255 { Ok(text.to_owned()) } else { Err("it has more than 255 bytes".to_owned()) }
}

/// Messages on their way at once: enough to keep a broker busy (rabbitmq.md §2.4).
const WINDOW: usize = 100;

pub(super) async fn publish(args: Args, settings: Settings) -> Result<(), Failure> {
    let (input, bar) = open(&args.file).await?;
    let connection = settings.connect("close-sync publish").await?;
    // Publishing into nowhere would end the channel, with an error that does not say why.
    topology::expect_exchange(&connection, &settings)
        .await
        .map_err(|error| Failure::Unavailable(explain(&error, &settings)))?;
    let publisher = Publisher::new(&connection).await?;
    let result = publish_lines(input, &settings, &publisher, &args, &bar).await;
    bar.finish_and_clear();
    amqp::disconnect(&connection).await;
    let Counts { published, bad } = result?;
    let with = args.routing_key.map(|key| format!(" with routing key `{key}`")).unwrap_or_default();
    anstream::eprintln!("published {} to `{}`{with}", count(published, "event", "events"), settings.exchange);
    if bad > 0 {
        anstream::eprintln!("{} not published, see above", count(bad, "line was", "lines were"));
        return Err(Failure::Told(INPUT));
    }
    Ok(())
}

async fn open(file: &PathBuf) -> Result<(Box<dyn AsyncBufRead + Unpin + Send>, ProgressBar), Failure> {
    // Hidden by itself when standard error is no terminal.
    let style =
        |template| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    if file.as_os_str() == "-" {
        let bar = ProgressBar::new_spinner().with_style(style("{spinner} {msg}"));
        return Ok((Box::new(BufReader::new(tokio::io::stdin())), bar));
    }
    let unreadable = |error| Failure::Input(format!("{} cannot be read: {error}", file.display()));
    let handle = tokio::fs::File::open(file).await.map_err(unreadable)?;
    let bytes = handle.metadata().await.map_err(unreadable)?.len();
    let bar = ProgressBar::new(bytes).with_style(style("{wide_bar} {percent}% {msg}, {eta} left"));
    Ok((Box::new(BufReader::new(handle)), bar))
}

#[derive(Default)]
struct Counts {
    published: u64,
    bad: u64,
}

async fn publish_lines(
    mut input: Box<dyn AsyncBufRead + Unpin + Send>,
    settings: &Settings,
    publisher: &Publisher,
    args: &Args,
    bar: &ProgressBar,
) -> Result<Counts, Failure> {
    let mut counts = Counts::default();
    let mut under_way: VecDeque<(usize, Sent)> = VecDeque::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = input.read_until(b'\n', &mut line).await;
        let read = read.map_err(|error| Failure::Input(format!("line {number} cannot be read: {error}")))?;
        if read == 0 {
            break;
        }
        bar.inc(read as u64);
        let body = line.trim_ascii();
        if body.is_empty() {
            continue;
        }
        let event = match Event::decode(body, usize::MAX) {
            Ok(event) => Some(event),
            Err(_) if args.unchecked => None,
            Err(malformed) => {
                counts.bad += 1;
                let told = match malformed {
                    Malformed::NotJson { column, .. } => format!("line {number}, column {column}: not JSON"),
                    Malformed::TooLarge { .. }
                    | Malformed::NotAnObject { .. }
                    | Malformed::Batch
                    | Malformed::WrongType { .. } => {
                        format!("line {number}: {malformed}")
                    }
                };
                bar.suspend(|| anstream::eprintln!("{told}"));
                continue;
            }
        };
        let key = args.routing_key.as_deref().unwrap_or_else(|| kind(event.as_ref()));
        let publish = publisher.send(&settings.exchange, key, body, properties(event.as_ref()));
        let sent =
            tokio::time::timeout(publisher::PATIENCE, publish).await.unwrap_or(Err(publisher::UNANSWERED));
        under_way
            .push_back((number, sent.map_err(|error| stopped(&error, number, counts.published, settings))?));
        if under_way.len() >= WINDOW {
            confirm(&mut under_way, &mut counts, settings, bar).await?;
        }
    }
    while !under_way.is_empty() {
        confirm(&mut under_way, &mut counts, settings, bar).await?;
    }
    Ok(counts)
}

async fn confirm(
    under_way: &mut VecDeque<(usize, Sent)>,
    counts: &mut Counts,
    settings: &Settings,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    if let Some((number, sent)) = under_way.pop_front() {
        let confirmed = tokio::time::timeout(publisher::PATIENCE, sent.confirmed()).await;
        confirmed
            .unwrap_or(Err(publisher::UNANSWERED))
            .map_err(|error| stopped(&error, number, counts.published, settings))?;
        counts.published += 1;
        bar.set_message(format!("{} published", counts.published));
    }
    Ok(())
}

/// Where it stopped.
fn stopped(error: &BrokerError, line: usize, published: u64, settings: &Settings) -> Failure {
    let message = explain(error, settings);
    Failure::Unavailable(format!(
        "line {line}: {message}\n{} published before it; this one and later ones perhaps",
        count(published, "event was", "events were")
    ))
}

/// What to do.
fn explain(error: &BrokerError, settings: &Settings) -> String {
    let unroutable = matches!(error, BrokerError::Unroutable { .. });
    let hint = match settings.topology {
        _ if unroutable => format!(
            "\nhint: a worker that has run binds its queue with `amqp.binding_keys` ({}): does one of them match? \
             `--routing-key` publishes with another key",
            settings.binding_keys.join(", ")
        ),
        _ if !matches!(error, BrokerError::Missing(_)) => String::new(),
        amqp::TopologyMode::Declare => format!(
            "\nhint: `close-sync run` declares exchange `{}` and its queue: start it once",
            settings.exchange
        ),
        amqp::TopologyMode::Check => {
            "\nhint: `close-sync check` tells what an administrator has to make".into()
        }
    };
    format!("{error}{hint}")
}

/// The event's type, which is also the routing key unless another is given. AMQP bounds both to 255 bytes.
fn kind(event: Option<&Event>) -> &str {
    event.and_then(|event| event.text("type")).filter(|kind| kind.len() <= 255).unwrap_or("identify")
}

fn properties(event: Option<&Event>) -> BasicProperties {
    let message_id = event.and_then(Event::message_id).map(str::to_owned);
    let message_id =
        message_id.filter(|id| id.len() <= 255).unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
    let time = event.and_then(Event::time).unwrap_or_else(Timestamp::now);
    BasicProperties::default()
        .with_message_id(message_id.into())
        .with_type(kind(event).into())
        .with_timestamp(u64::try_from(time.as_second()).unwrap_or(0))
        .with_content_type("application/json".into())
        .with_app_id("close-sync publish".into())
}
