"""A web page for a model: pictures from prompts and pictures, edited clips, a gallery.

`studio` and `clips` make, `uploads` reads what strangers send, `wishes` checks what they ask for;
none of them knows the page. `page` lays it out, `handlers` answers its clicks, `server` serves it.
"""
