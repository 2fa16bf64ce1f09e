// Hanse is the command that people use: it talks to hansed by package admin and prints what it hears.
//
//	hanse VERB ─► context (socket or admin SVID) ─► admin.Client ═► hansed
//	                                                   │
//	stdout ◄─ table, -o json|yaml ◄────────────────────┘
//
// The first line of every output is the answer. Standard output has the result and nothing else; progress, questions and errors
// go to standard error. Exit codes: 0 done, 1 failed, 2 usage. What a person can do about an error is on its "hint:" line.
package main
