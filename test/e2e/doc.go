// Package e2e runs the real programs, as processes on loopback, and hurts them: kill -9, SIGSTOP, restarts with nobody else there.
// TestCapture runs them in network namespaces, before applications that know nothing of a mesh.
//
// Timers are shortened so that a run takes a minute or two; with HANSE_SOAK=1 (make soak) they are full length.
package e2e
