//! `close-sync publish`.

use std::collections::VecDeque;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use lapin::BasicProperties;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};

use crate::amqp::publisher::{self, Outgoing, Publisher, Sent};
use crate::amqp::{self, BrokerError, Settings, topology};
use crate::cli::failure::{Failure, USAGE};
use crate::cli::input::cannot_read;
use crate::domain::event::{Event, Malformed};
use crate::text::{count, line as one_line};

/// Publish events from a file to the exchange, as a producer would.
///
/// The file contains one JSON object per line. Messages are published in this order, persistent, mandatory and
/// confirmed, with `message_id` (the event's `messageId`, or a new id), `type`, `timestamp` and `content_type`. The
/// routing key is the event's type, or `identify` if it has none.
///
/// A line that is not a JSON object, or not a valid event, is reported with its number and not published. The exit
/// code is then 2. Use `plan` to check what the mapping finds in an event.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Read events from this file, one JSON object per line, or from standard input with `-`.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Publish every line unchanged, even if it is not a valid event.
    #[arg(long)]
    unchecked: bool,
    /// Use this routing key for all events. Default: each event's type.
    #[arg(long, value_name = "KEY", value_parser = routing_key)]
    routing_key: Option<String>,
}

/// AMQP limits routing keys to 255 bytes.
fn routing_key(text: &str) -> Result<String, String> {
    if text.len() <= 255 { Ok(text.to_owned()) } else { Err("longer than 255 bytes".to_owned()) }
}

/// How many messages may be unconfirmed: enough to keep the broker busy (rabbitmq.md §2.4).
const MAX_UNCONFIRMED: usize = 100;

pub(super) async fn publish(args: Args, settings: Settings) -> Result<(), Failure> {
    let (input, bar) = open(&args.file).await?;
    let connection = settings.connect("close-sync publish").await?;
    // Publishing to a missing exchange would close the channel with an error that does not name the cause.
    topology::expect_exchange(&connection, &settings)
        .await
        .map_err(|error| Failure::Unavailable(explain(&error, &settings)))?;
    let publisher = Publisher::new(&connection).await?;
    let result = publish_lines(input, &settings, &publisher, &args, &bar).await;
    bar.finish_and_clear();
    amqp::disconnect(&connection).await;
    let Counts { published, bad } = result?;
    let with = args.routing_key.map(|key| format!(" with routing key `{key}`")).unwrap_or_default();
    let target = one_line(&format!("to `{}`{with}", settings.exchange));
    anstream::eprintln!("published {} {target}", count(published, "event", "events"));
    if bad > 0 {
        anstream::eprintln!("{} not published, see above", count(bad, "line was", "lines were"));
        return Err(Failure::Reported(USAGE));
    }
    Ok(())
}

async fn open(file: &PathBuf) -> Result<(Box<dyn AsyncBufRead + Unpin + Send>, ProgressBar), Failure> {
    // Bars hide themselves when standard error is not a terminal.
    let style =
        |template| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    if file.as_os_str() == "-" {
        let bar = ProgressBar::new_spinner().with_style(style("{spinner} {msg}"));
        return Ok((Box::new(BufReader::new(tokio::io::stdin())), bar));
    }
    let unreadable = |error| cannot_read(file, &error);
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
    let mut unconfirmed: VecDeque<(usize, Sent)> = VecDeque::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = input.read_until(b'\n', &mut line).await;
        let read = read.map_err(|error| Failure::Input(format!("cannot read line {number}: {error}")))?;
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
                let message = match malformed {
                    Malformed::NotJson { column, .. } => format!("line {number}, column {column}: not JSON"),
                    Malformed::TooLarge { .. }
                    | Malformed::TooManyValues { .. }
                    | Malformed::Encoding(_)
                    | Malformed::NotAnObject { .. }
                    | Malformed::Batch
                    | Malformed::WrongType { .. } => {
                        format!("line {number}: {malformed}")
                    }
                };
                bar.suspend(|| anstream::eprintln!("{}", one_line(&message)));
                continue;
            }
        };
        let key = args.routing_key.as_deref().unwrap_or_else(|| kind(event.as_ref()));
        let (exchange, properties) = (settings.exchange.as_str(), properties(event.as_ref()));
        unconfirmed.push_back((number, publisher.send(Outgoing { exchange, key, body, properties })));
        if unconfirmed.len() >= MAX_UNCONFIRMED {
            confirm(&mut unconfirmed, &mut counts, settings, bar).await?;
        }
    }
    while !unconfirmed.is_empty() {
        confirm(&mut unconfirmed, &mut counts, settings, bar).await?;
    }
    Ok(counts)
}

async fn confirm(
    unconfirmed: &mut VecDeque<(usize, Sent)>,
    counts: &mut Counts,
    settings: &Settings,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    if let Some((number, sent)) = unconfirmed.pop_front() {
        let confirmed = tokio::time::timeout(publisher::PATIENCE, sent.confirmed()).await;
        confirmed
            .unwrap_or(Err(publisher::UNANSWERED))
            .map_err(|error| stopped(&error, number, counts.published, settings))?;
        counts.published += 1;
        bar.set_message(format!("{} published", counts.published));
    }
    Ok(())
}

/// A publishing error, with the position in the file.
fn stopped(error: &BrokerError, line: usize, published: u64, settings: &Settings) -> Failure {
    let message = explain(error, settings);
    Failure::Unavailable(format!(
        "line {line}: {message}\n{} published before this line; this event and later ones may have been published too",
        count(published, "event was", "events were")
    ))
}

/// The error with a hint on what to do.
fn explain(error: &BrokerError, settings: &Settings) -> String {
    let unroutable = matches!(error, BrokerError::Unroutable { .. });
    let hint = match settings.topology {
        _ if unroutable => format!(
            "\nhint: the worker binds its queue with `amqp.binding_keys` ({}); start it, or use a matching key with \
             `--routing-key`",
            settings.binding_keys.join(", ")
        ),
        _ if !matches!(error, BrokerError::Missing(_)) => String::new(),
        amqp::TopologyMode::Declare => format!(
            "\nhint: start `close-sync run` once; it declares exchange `{}` and its queue",
            settings.exchange
        ),
        amqp::TopologyMode::Check => {
            "\nhint: `close-sync check` reports what an administrator must create".into()
        }
    };
    format!("{}{hint}", one_line(&error.to_string()))
}

/// The event's type, which is also the default routing key. AMQP limits both to 255 bytes.
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
