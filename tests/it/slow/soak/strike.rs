//! What goes wrong.

use std::time::Duration;

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use lapin::options::ExchangeDeleteOptions;
use lapin::types::FieldTable;

use super::crew::Crew;
use crate::support::{Bench, Node};

#[derive(Clone, Copy, Debug)]
pub(super) enum Strike {
    WorkerKilled,
    WorkerReplaced,
    WorkerFrozenForAMoment,
    WorkerFrozenForLong,
    BrokerKilled,
    BrokerFrozen,
    BrokerAlarm,
    ConnectionsCut,
    ConnectionsMute,
    ConnectionsClosed,
    BindingRemoved,
    ExchangeDeleted,
    CloseFails,
    CloseDropsConnections,
    CloseHangs,
    CloseIsBusy,
}

const ALL: [Strike; 16] = [
    Strike::WorkerKilled,
    Strike::WorkerReplaced,
    Strike::WorkerFrozenForAMoment,
    Strike::WorkerFrozenForLong,
    Strike::BrokerKilled,
    Strike::BrokerFrozen,
    Strike::BrokerAlarm,
    Strike::ConnectionsCut,
    Strike::ConnectionsMute,
    Strike::ConnectionsClosed,
    Strike::BindingRemoved,
    Strike::ExchangeDeleted,
    Strike::CloseFails,
    Strike::CloseDropsConnections,
    Strike::CloseHangs,
    Strike::CloseIsBusy,
];

/// Those that have not been drawn since it was filled: each kind comes once before any comes again.
#[derive(Default)]
pub(super) struct Bag(Vec<Strike>);

impl Bag {
    pub(super) fn draw(&mut self, random: &mut fastrand::Rng) -> Strike {
        if self.0.is_empty() {
            self.0.extend(ALL);
        }
        self.0.swap_remove(random.usize(..self.0.len()))
    }
}

impl Strike {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::WorkerKilled => "worker killed",
            Self::WorkerReplaced => "worker replaced",
            Self::WorkerFrozenForAMoment => "worker frozen for a moment",
            Self::WorkerFrozenForLong => "worker frozen for long",
            Self::BrokerKilled => "broker killed",
            Self::BrokerFrozen => "broker frozen",
            Self::BrokerAlarm => "broker alarm",
            Self::ConnectionsCut => "connections cut",
            Self::ConnectionsMute => "connections mute",
            Self::ConnectionsClosed => "connections closed by broker",
            Self::BindingRemoved => "binding removed",
            Self::ExchangeDeleted => "retry exchange deleted",
            Self::CloseFails => "Close answers 5xx",
            Self::CloseDropsConnections => "Close drops connections",
            Self::CloseHangs => "Close hangs",
            Self::CloseIsBusy => "Close answers 429",
        }
    }

    /// Strikes, and mends it again; what Close does stops by itself.
    pub(super) async fn strike(
        self,
        bench: &Bench,
        node: &Node,
        crew: &mut Crew,
        random: &mut fastrand::Rng,
    ) {
        let hold = async |ms: u64| tokio::time::sleep(Duration::from_millis(ms)).await;
        match self {
            Self::WorkerKilled => crew.replace_active("KILL").await,
            Self::WorkerReplaced => crew.replace_active("TERM").await,
            Self::WorkerFrozenForAMoment | Self::WorkerFrozenForLong => {
                let long = matches!(self, Self::WorkerFrozenForLong);
                let worker = &crew.active().await.worker;
                worker.signal("STOP");
                // The broker gives its queue away after three heartbeats of three seconds.
                hold(if long { 12_000 } else { random.u64(500..3000) }).await;
                worker.signal("CONT");
            }
            Self::BrokerKilled => {
                node.kill().await;
                node.start_again().await;
            }
            Self::BrokerFrozen => {
                node.pause().await;
                hold(random.u64(500..9000)).await;
                node.resume().await;
            }
            Self::BrokerAlarm => {
                node.alarm(true).await;
                hold(random.u64(500..4000)).await;
                node.alarm(false).await;
            }
            Self::ConnectionsCut => crew.active().await.proxy.cut(),
            Self::ConnectionsMute => {
                let proxy = &crew.active().await.proxy;
                proxy.mute(true);
                hold(random.u64(500..9000)).await;
                proxy.mute(false);
            }
            Self::ConnectionsClosed => drop(node.ctl(&["close_all_connections", "a test"]).await),
            Self::BindingRemoved => {
                let (queue, exchange) = (bench.queue.as_str().into(), bench.exchange.as_str().into());
                let channel = bench.channel().await;
                let _ = channel.queue_unbind(queue, exchange, "#".into(), FieldTable::default()).await;
            }
            Self::ExchangeDeleted => {
                let exchange = format!("{}.retry", bench.queue).into();
                let _ =
                    bench.channel().await.exchange_delete(exchange, ExchangeDeleteOptions::default()).await;
            }
            Self::CloseFails => {
                let code = [500, 502, 503, 504][random.usize(..4)];
                let when = when(random);
                hit(bench, random, Effect::Status { code, body: FaultBody::Empty, when });
            }
            Self::CloseDropsConnections => {
                let when = when(random);
                hit(bench, random, Effect::DropConnection { when });
            }
            // Longer than the worker waits.
            Self::CloseHangs => {
                let when = when(random);
                hit(bench, random, Effect::Timeout { ms: 3000, when });
            }
            Self::CloseIsBusy => {
                let with_headers = random.bool();
                // A few: each one that its headers do not explain makes the worker slower, as there may be a limit it
                // does not know.
                let busy = Effect::RateLimited { retry_after: 0.5, with_headers };
                bench.simulator.fault(Fault::new(busy).times(random.u32(1..4)));
            }
        }
    }
}

fn when(random: &mut fastrand::Rng) -> When {
    if random.bool() { When::BeforeCommit } else { When::AfterCommit }
}

/// Some requests of one kind meet it.
fn hit(bench: &Bench, random: &mut fastrand::Rng, effect: Effect) {
    let kinds = [("POST", "/lead/"), ("POST", "/contact/"), ("PUT", "/"), ("GET", "/"), ("POST", "/data/")];
    let (method, path) = kinds[random.usize(..kinds.len())];
    bench.simulator.fault(Fault::new(effect).on(method, path).times(random.u32(1..40)));
}
