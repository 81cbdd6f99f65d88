//! The disruptions of a soak test.

use std::time::Duration;

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use lapin::options::ExchangeDeleteOptions;
use lapin::types::FieldTable;

use super::workers::Workers;
use crate::support::{Bench, Node};

#[derive(Clone, Copy, Debug)]
pub(super) enum Disruption {
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

const ALL: [Disruption; 16] = [
    Disruption::WorkerKilled,
    Disruption::WorkerReplaced,
    Disruption::WorkerFrozenForAMoment,
    Disruption::WorkerFrozenForLong,
    Disruption::BrokerKilled,
    Disruption::BrokerFrozen,
    Disruption::BrokerAlarm,
    Disruption::ConnectionsCut,
    Disruption::ConnectionsMute,
    Disruption::ConnectionsClosed,
    Disruption::BindingRemoved,
    Disruption::ExchangeDeleted,
    Disruption::CloseFails,
    Disruption::CloseDropsConnections,
    Disruption::CloseHangs,
    Disruption::CloseIsBusy,
];

/// The disruptions not yet drawn. Every kind is drawn once before any is drawn again.
#[derive(Default)]
pub(super) struct DisruptionBag(Vec<Disruption>);

impl DisruptionBag {
    pub(super) fn draw(&mut self, random: &mut fastrand::Rng) -> Disruption {
        if self.0.is_empty() {
            self.0.extend(ALL);
        }
        self.0.swap_remove(random.usize(..self.0.len()))
    }
}

impl Disruption {
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

    /// Applies the disruption and reverts it. Faults of Close end by themselves.
    pub(super) async fn apply(
        self,
        bench: &Bench,
        node: &Node,
        workers: &mut Workers,
        random: &mut fastrand::Rng,
    ) {
        let wait = async |ms: u64| tokio::time::sleep(Duration::from_millis(ms)).await;
        match self {
            Self::WorkerKilled => workers.replace_active("KILL").await,
            Self::WorkerReplaced => workers.replace_active("TERM").await,
            Self::WorkerFrozenForAMoment | Self::WorkerFrozenForLong => {
                let is_long = matches!(self, Self::WorkerFrozenForLong);
                let worker = &workers.active().await.worker;
                worker.signal("STOP");
                // The broker drops the connection after three missed heartbeats of three seconds.
                wait(if is_long { 12_000 } else { random.u64(500..3000) }).await;
                worker.signal("CONT");
            }
            Self::BrokerKilled => {
                node.kill().await;
                node.start_again().await;
            }
            Self::BrokerFrozen => {
                node.pause().await;
                wait(random.u64(500..9000)).await;
                node.resume().await;
            }
            Self::BrokerAlarm => {
                node.alarm(true).await;
                wait(random.u64(500..4000)).await;
                node.alarm(false).await;
            }
            Self::ConnectionsCut => workers.active().await.proxy.cut(),
            Self::ConnectionsMute => {
                let proxy = &workers.active().await.proxy;
                proxy.mute(true);
                wait(random.u64(500..9000)).await;
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
                add_fault(bench, random, Effect::Status { code, body: FaultBody::Empty, when });
            }
            Self::CloseDropsConnections => {
                let when = when(random);
                add_fault(bench, random, Effect::DropConnection { when });
            }
            // Longer than the worker's timeout.
            Self::CloseHangs => {
                let when = when(random);
                add_fault(bench, random, Effect::Timeout { ms: 3000, when });
            }
            Self::CloseIsBusy => {
                let with_headers = random.bool();
                // Only a few. A 429 without matching headers suggests a hidden limit, so each one slows the worker down.
                let effect = Effect::RateLimited { retry_after: 0.5, with_headers };
                bench.simulator.fault(Fault::new(effect).times(random.u32(1..4)));
            }
        }
    }
}

fn when(random: &mut fastrand::Rng) -> When {
    if random.bool() { When::BeforeCommit } else { When::AfterCommit }
}

/// Applies the effect to some requests of one kind.
fn add_fault(bench: &Bench, random: &mut fastrand::Rng, effect: Effect) {
    let kinds = [("POST", "/lead/"), ("POST", "/contact/"), ("PUT", "/"), ("GET", "/"), ("POST", "/data/")];
    let (method, path) = kinds[random.usize(..kinds.len())];
    bench.simulator.fault(Fault::new(effect).on(method, path).times(random.u32(1..40)));
}
