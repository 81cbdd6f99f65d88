//! RabbitMQ and its administrators: outages, alarms, permissions, TLS, topology.

mod checkpoints;
mod hostile;
mod journal;
mod misbehaving;
mod nodes;
mod outcome_events;
mod permissions;
mod publisher;
mod restarts;
mod tls;
mod topology;
