//! The dead-letter queue, as operators use it: list, filter, replay, edit, export and import.
//!
//! | file | content |
//! | --- | --- |
//! | [`letter`] | one dead letter |
//! | [`filter`] | selects dead letters |
//! | [`group`] | groups dead letters that failed with the same error |
//! | [`scan`] | takes dead letters off the queue, decides on each, and returns the others |
//! | [`replay`], [`progress`] | sends dead letters through the work queue again, the first one alone |
//! | [`export`] | the format of a dead letter in a file |
//! | [`edit`], [`import`] | put edited and exported dead letters into the queue |
//!
//! **Nothing is lost.** A dead letter is acked only after RabbitMQ confirmed its successor: a replayed message or an edited
//! copy. If the process is killed in between, both exist. An extra replay changes nothing in Close. An edited copy names
//! in a header what it replaces, by a hash of the whole content, so that the next replay, edit or discard deletes the
//! replaced one ([`edit`]). An id alone is not enough: files and producers may repeat it.

pub mod edit;
pub mod export;
pub mod filter;
pub mod group;
pub mod guard;
pub mod import;
pub mod letter;
pub mod progress;
pub mod replay;
pub mod scan;
