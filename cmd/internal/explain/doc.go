// Package explain says how a call from one workload to a service would go, step by step as the data path takes them, and at which
// it would fail.
//
//	View, proxies, health (from load reports) ─► Explain ─► name, route, levels, trust, policy, config; the verdict first
//
// It is pure. It asks the same functions that make xDS resources, so that it cannot tell another story than the one in force.
package explain
