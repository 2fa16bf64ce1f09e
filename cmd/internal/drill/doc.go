// Package drill fails part of a cluster on purpose and tells what happened: it plans, orders the faults, watches a guard and
// reports.
//
//	Spec ─► Plan (who would take the load) ─► Run ─► faults over xDS ─► sidecars (executors)
//	load reports (LRS) ─► Observe ─► guard, report
//
// A drill is obeyed only in the cluster whose control plane runs it. Executors heal by themselves: at the drill's end, and 15 s
// after the last renewal, whoever has died. The report is computed by pure functions from one-second samples and events.
package drill
