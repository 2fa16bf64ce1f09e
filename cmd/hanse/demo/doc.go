// Package demo runs three clusters on this machine and tells their story: they join with the commands that people use, calls go to the
// nearest place, one is refused, and a failover drill fails west's payments and brings them back.
//
//	layout ─► files (deploy/demo) ─► processes ─► hanse commands, calls, drills ─► observations ─► Report
//
// All of it is in one directory and on loopback addresses; it needs neither root nor a network. Every process dies with this one,
// in whatever way it dies (where the system has no such signal, Down finds them by the directory in their command line).
// The Report is OK only if all that it claims was observed.
package demo
