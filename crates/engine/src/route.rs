//! From a name to a function, and from a function to the revision that takes its calls. Read by every call, without a lock.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};
use funtainer_model::{FunctionId, Namespace, Slug};

use crate::instance::InstanceState;
use crate::owner::LastError;
use crate::revision::{Revision, port_of};
use crate::view::{FunctionView, InstanceView};

/// A function that can be called.
pub(crate) struct Function {
    pub(crate) id: FunctionId,
    pub(crate) slug: Slug,
    /// The revision that takes the calls.
    pub(crate) current: ArcSwap<Revision>,
    /// Set before its revision is retired for good.
    pub(crate) removed: AtomicBool,
    pub(crate) last_error: LastError,
    /// Revisions that finish their calls.
    former: Mutex<Vec<Arc<Revision>>>,
}

/// All functions. Replaced as a whole by the few changes.
#[derive(Default)]
pub(crate) struct Routes {
    by_id: BTreeMap<FunctionId, Arc<Function>>,
    /// By slug, and by canonical name in the namespace `default`.
    by_text: HashMap<Box<str>, Arc<Function>>,
}

impl Function {
    pub(crate) fn new(revision: Arc<Revision>, last_error: LastError) -> Arc<Self> {
        let id = revision.record.spec.id.clone();
        let slug = id.slug();
        let (removed, former) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Self { id, slug, current: ArcSwap::new(revision), removed, last_error, former })
    }

    /// Gives the calls to another revision; returns the former one.
    pub(crate) fn switch(&self, to: Arc<Revision>) -> Arc<Revision> {
        let former = self.current.swap(to);
        let mut all = self.former.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|revision| !revision.is_gone());
        all.push(Arc::clone(&former));
        former
    }

    /// The revisions that still have instances, oldest first, the current one last.
    pub(crate) fn revisions(&self) -> Vec<Arc<Revision>> {
        let former = self.former.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = former.iter().filter(|revision| !revision.is_gone()).cloned().collect();
        drop(former);
        all.push(self.current.load_full());
        all
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::SeqCst)
    }

    pub(crate) fn view(&self) -> FunctionView {
        let current = self.current.load_full();
        let record = &current.record;
        let mut instances: Vec<_> = self.revisions().iter().flat_map(|revision| revision.views()).filter(exists).collect();
        // Those that were adopted came in any order.
        instances.sort_unstable_by_key(|instance| instance.id);
        FunctionView {
            id: self.id.clone(),
            slug: self.slug.clone(),
            revision: record.id,
            image: record.spec.image.clone(),
            digest: record.digest,
            port: port_of(&record.plan),
            concurrency: record.plan.concurrency,
            spec: record.spec.clone(),
            deployed_at: record.created_at,
            instances,
            last_error: self.last_error.load().as_deref().cloned(),
        }
    }
}

fn exists(view: &InstanceView) -> bool {
    !matches!(view.state, InstanceState::Stopped | InstanceState::Failed)
}

impl Routes {
    /// The function with the slug `text`, or with this canonical name in the namespace `default`.
    pub(crate) fn find(&self, text: &str) -> Option<&Arc<Function>> {
        self.by_text.get(text)
    }

    pub(crate) fn get(&self, id: &FunctionId) -> Option<&Arc<Function>> {
        self.by_id.get(id)
    }

    /// By namespace and name.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Function>> {
        self.by_id.values()
    }

    /// The same with `function`.
    pub(crate) fn with(&self, function: &Arc<Function>) -> Self {
        let mut by_id = self.by_id.clone();
        by_id.insert(function.id.clone(), Arc::clone(function));
        Self::of(by_id)
    }

    /// The same without the function.
    pub(crate) fn without(&self, id: &FunctionId) -> Self {
        let mut by_id = self.by_id.clone();
        by_id.remove(id);
        Self::of(by_id)
    }

    pub(crate) fn of(by_id: BTreeMap<FunctionId, Arc<Function>>) -> Self {
        let mut by_text = HashMap::with_capacity(by_id.len() * 2);
        for function in by_id.values() {
            // A canonical name that is a slug is this function's own: slugs are unique, and a label is its own slug.
            if function.id.namespace == Namespace::default() {
                by_text.insert(function.id.name.as_str().into(), Arc::clone(function));
            }
            by_text.insert(function.slug.as_str().into(), Arc::clone(function));
        }
        Self { by_id, by_text }
    }
}

/// Routes that can be replaced while they are read.
pub(crate) type RouteTable = ArcSwap<Routes>;

/// An empty last error.
pub(crate) fn no_error() -> LastError {
    Arc::new(ArcSwapOption::empty())
}
