//! What a user may do with a file, by the modes of it and of the folders above it. Access lists and mandatory access control are not
//! considered: they are seldom used here, and only the kernel could tell.

use std::collections::BTreeSet;

/// The user that enclaves are launched as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The user's name, or number.
    pub name: String,
    /// The user's number.
    pub uid: u32,
    /// Numbers of all groups, the user's own among them.
    pub groups: BTreeSet<u32>,
    /// It is this very process: what it could open itself, it may open.
    pub is_this_process: bool,
    /// How it was found out who that is: `the running daemon, process 12`.
    pub how: String,
}

/// Something in the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Where.
    pub path: String,
    /// What.
    pub kind: NodeKind,
    /// Permission bits (`0o660`).
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// A file.
    File,
    /// A folder.
    Folder,
    /// Something else.
    Other,
}

/// A path as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathSeen {
    /// Where.
    pub path: String,
    /// The folders above it that are there, the root first.
    pub above: Vec<Node>,
    /// What is there; `None`: nothing.
    pub node: Option<Node>,
}

/// Reading.
pub const READ: u32 = 0o4;
/// Writing.
pub const WRITE: u32 = 0o2;
/// Entering a folder.
pub const ENTER: u32 = 0o1;

impl Account {
    /// Whether the mode allows all of `wanted` (`READ | WRITE`). As the kernel does it: the first of owner, group and others that
    /// fits is the one that counts.
    pub fn may(&self, node: &Node, wanted: u32) -> bool {
        let bits = if self.uid == 0 {
            return true;
        } else if self.uid == node.uid {
            node.mode >> 6
        } else if self.groups.contains(&node.gid) {
            node.mode >> 3
        } else {
            node.mode
        };
        bits & wanted == wanted
    }

    /// What is in the way of reaching that path and doing that with it; `None`: nothing.
    pub fn kept_from(&self, seen: &PathSeen, wanted: u32) -> Option<String> {
        let closed = |node: &Node, word: &str| {
            format!(
                "user {} may not {word} {} (mode {:04o}, user {}, group {})",
                self.name, node.path, node.mode, node.uid, node.gid
            )
        };
        if let Some(folder) = seen.above.iter().find(|folder| !self.may(folder, ENTER)) {
            return Some(closed(folder, "enter"));
        }
        let Some(node) = &seen.node else { return Some(format!("{} is missing", seen.path)) };
        let word = if wanted & WRITE == 0 { "read" } else { "write to" };
        (!self.may(node, wanted)).then(|| closed(node, word))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// User 990 with its own group and group 991.
    pub(crate) fn account() -> Account {
        Account {
            name: "enclaved".to_owned(),
            uid: 990,
            groups: [990, 991].into(),
            is_this_process: false,
            how: "user enclaved".to_owned(),
        }
    }

    pub(crate) fn node(path: &str, kind: NodeKind, mode: u32, uid: u32, gid: u32) -> Node {
        Node { path: path.to_owned(), kind, mode, uid, gid }
    }

    pub(crate) fn seen(node: Node) -> PathSeen {
        let above = vec![self::node("/", NodeKind::Folder, 0o755, 0, 0)];
        PathSeen { path: node.path.clone(), above, node: Some(node) }
    }

    #[test]
    fn the_first_class_that_fits_counts_even_if_a_later_one_would_allow_more() {
        let account = account();
        let may = |mode, uid, gid| account.may(&node("/x", NodeKind::File, mode, uid, gid), READ | WRITE);
        assert!(may(0o660, 0, 991), "by its group");
        assert!(!may(0o606, 0, 991), "its group may not, though others may");
        assert!(!may(0o066, 990, 991), "the owner may not");
        assert!(!may(0o660, 0, 5));
        let root = Account { uid: 0, ..account };
        assert!(root.may(&node("/x", NodeKind::File, 0, 5, 5), READ));
    }

    #[test]
    fn a_folder_on_the_way_that_can_not_be_entered_is_named() {
        let mut seen = seen(node("/secret/x", NodeKind::File, 0o644, 0, 0));
        assert_eq!(account().kept_from(&seen, READ), None);
        seen.above.push(node("/secret", NodeKind::Folder, 0o700, 0, 0));
        assert_eq!(
            account().kept_from(&seen, READ).unwrap(),
            "user enclaved may not enter /secret (mode 0700, user 0, group 0)"
        );
    }

    proptest! {
        #[test]
        fn whoever_may_both_may_each(mode in 0_u32..0o1000, uid in 989_u32..992, gid in 989_u32..993) {
            let (account, node) = (account(), node("/x", NodeKind::File, mode, uid, gid));
            let both = account.may(&node, READ | WRITE);
            prop_assert_eq!(both, account.may(&node, READ) && account.may(&node, WRITE));
        }
    }
}
