// Package storetest has a Store in memory, a Link that fails on demand, and the contract that every etcd.Store passes.
//
//	Memory ─► Link (cut, black hole, delay, refuse) ─► what is tested
//
// Memory keeps revisions, compaction and watches as etcd does, and waits only on channels, so that scenarios run in a synctest bubble.
package storetest
