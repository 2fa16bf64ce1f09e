// Package capture turns an application's connections to its sidecar, without the application's help, by rules of the kernel.
//
//	app ─► connect(240.0.0.7:80) ─► chain output ─► redirect ─► outbound port of the sidecar ─► Original: 240.0.0.7:80
//	somebody ─► pod:8080 ─► chain prerouting ─► redirect ─► inbound port of the sidecar ─► Original: pod:8080
//
// A table of its own, family inet, holds all there is: Install replaces it in one transaction, or leaves it alone where it is as wanted
// already; Remove takes it away whole. What the sidecar itself connects to is exempt by its mark (Control) or its user.
// Only first packets are looked at, so connections older than the table go on as they were.
package capture
