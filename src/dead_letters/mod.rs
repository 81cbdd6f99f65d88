//! The operator's side of the dead-letter queue.
//!
//! In reading order: [`letter`] is one dead letter; [`filter`] which ones are meant, and what they have in common;
//! [`scan`] takes them off the queue, has each decided on, and gives back what is to stay; [`replay`] sends them
//! through the work queue again, first one and then the rest, and hears what becomes of them ([`progress`]);
//! [`export`] is how they look in a file; [`edit`] puts edited and restored ones back.
//!
//! **Nothing is lost.** A dead letter is acked only after its successor is confirmed, be it a replay or an edited
//! copy: whoever is killed in between leaves both, never neither. A replay too many changes nothing in Close. A copy
//! names in a header exactly what it takes the place of, by its whole content, so that the next replay, edit or
//! discard finishes what was killed ([`edit`]); an id alone proves nothing, as files and producers may repeat it.

pub mod edit;
pub mod export;
pub mod filter;
pub mod import;
pub mod letter;
pub mod progress;
pub mod replay;
pub mod scan;
