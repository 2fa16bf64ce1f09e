// Package daemon is what hansed and hanse-proxy share of being a long-lived process: signals, a group of Runs, JSON logs, and the
// admin port.
//
//	main ─► Signals ─► Group.Run ─► Runs ─► all ended ─► exit
//	                       └─► Admin: /readyz /livez /metrics /debug/…
//
// The admin port serves loopback addresses only: what it shows is for whoever may log in to the machine.
package daemon
