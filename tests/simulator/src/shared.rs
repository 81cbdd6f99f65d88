//! The simulator's state behind a lock, shared by all connections.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::world::World;

#[derive(Debug)]
pub(crate) struct Shared {
    world: Mutex<World>,
}

impl Shared {
    pub(crate) fn new(world: World) -> Self {
        Self { world: Mutex::new(world) }
    }

    /// Locks the state. It stays usable after a panic in another request.
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
