// Package file reads objects from a directory of YAML and JSON files, and keeps reading them.
//
//	directory ─► scan (on fsnotify events, debounced, and every 30 s) ─► last good version of each file ─► objects.Set
//
// A file takes effect whole or not at all: while it has a fault, its last good version stays in force and the fault is
// listed. So it is with a directory that cannot be read. Only removing a file removes its objects; an emptied one is a
// fault. Sub-directories are read too. Names that begin with "." or end with "~" or ".tmp" are left alone, and files may be symbolic
// links, so that editors' temporary files do no harm and a mounted ConfigMap works.
package file
